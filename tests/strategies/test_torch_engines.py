"""DDP and FSDP2 from inside, run by a pair of real processes."""

import pytest
import strategy_jobs
from commands import SOON, first_line, run, write_config
from safetensors.torch import load_file

from mmtrain.strategies.lockstep import FIRST


@pytest.fixture
def job(pair, tmp_path):
    """Runs a job; what both ranks give is the same."""

    def run(function, **kwargs):
        results = pair.run("strategy_jobs", function, work_dir=str(tmp_path), **kwargs)
        assert results[0] == results[1]
        return results[0]

    return run


def fsdp(**options):
    return {"type": "FSDPStrategy", **options}


def ddp(**options):
    return {"type": "DDPStrategy", **options}


# ---- how a model is sharded ------------------------------------------------------------------------------------------
def test_shards_by_class(pair, tmp_path):
    found = pair.run("strategy_jobs", "layout", work_dir=str(tmp_path), strategy=fsdp(wrap="TinyBlock"))
    assert found[0]["groups"] == ["TinyLanguageModel", "TinyBlock", "TinyBlock"]
    for name, (own, full) in found[0]["sizes"].items():
        assert own + found[1]["sizes"][name][0] == full


def test_shards_by_size(job):
    assert job("layout", strategy=fsdp(min_params=100, mesh={"replicate": 2}))["groups"].count("Linear") == 4


def test_hybrid_sharding_repeats(job):
    sizes = job("layout", strategy=fsdp(mesh={"replicate": 2, "shard": 1}))["sizes"]
    assert all(own == full for own, full in sizes.values())


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        (fsdp(wrap="TinyBlok"), ["strategy.wrap", "'TinyBlok'", "did you mean 'TinyBlock'"]),
        (fsdp(wrap=["Embedding"]), ["strategy.wrap", "embed.weight and head.weight are one parameter"]),
        (fsdp(activation_checkpointing="Nothing"), ["strategy.activation_checkpointing", "'Nothing'", "TinyBlock"]),
        (fsdp(mesh={"shard": 3}), ["strategy.mesh", "3 processes, but 2 were started"]),
        (fsdp(mesh={"ddp": 2}), ["strategy.mesh.ddp", "'replicate'"]),
        (fsdp(mesh={"shard": 0}), ["strategy.mesh.shard", "positive"]),
        (fsdp(mixed_precision={"param_type": "bfloat16"}), ["mixed_precision.param_type", "param_dtype"]),
        (fsdp(mixed_precision={"param_dtype": "bf16"}), ["mixed_precision.param_dtype", "'bf16'", "bfloat16"]),
        (fsdp(meta_init=True), ["strategy.meta_init", "TinyLanguageModel has no init_weights()"]),
        (fsdp(warp="TinyBlock"), ["strategy.warp", "did you mean 'wrap'"]),
        (ddp(static_graph=True), ["strategy.static_graph", "accumulative_counts=2"]),
        (ddp(sync_bn="mm"), ["strategy.sync_bn", "'torch'"]),
        (ddp(sync_bn="torch"), ["strategy.sync_bn", "CUDA"]),
        ({"type": "SingleDeviceStrategy"}, ["2 were started", "DDPStrategy"]),
    ],
)
def test_refused_in_one_sentence(job, strategy, words):
    message = job("refused", strategy=strategy)
    assert message.startswith("ConfigError: ")
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_an_incomplete_init_weights_is_refused(job):
    message = job("refused", model={"type": "Initialised", "forgets": True}, strategy=fsdp(meta_init=True))
    assert "init_weights() gives no value to scale" in message
    message = job("refused", model={"type": "Initialised", "masked": True}, strategy=fsdp(meta_init=True))
    assert "init_weights() gives no value to mask" in message


# ---- initial weights -------------------------------------------------------------------------------------------------
def test_built_normally_the_weights_are_those_of_one_process(job, tmp_path):
    alone = strategy_jobs.initial_weights(str(tmp_path / "alone"), False)
    assert job("initial_weights", meta_init=False) == alone


def test_built_without_memory_every_value_is_drawn(job):
    found = job("initial_weights", meta_init=True)
    assert found["tied"]
    normal = job("initial_weights", meta_init=False)
    assert found["parameters"] == normal["parameters"]
    weights = found["weights"]
    assert weights["scale"] == [0.5]
    assert weights["embed.weight"] == weights["head.weight"]
    rows = {tuple(row) for row in weights["blocks.0.up.weight"]}
    assert len(rows) == 21, "the ranks drew the same values for different rows"
    assert weights["blocks.0.up.weight"] != weights["blocks.1.up.weight"]


# ---- training --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("strategy", [ddp(), fsdp(wrap="TinyBlock")], ids=["ddp", "fsdp"])
def test_gradients_are_exchanged_only_at_the_end_of_a_window(job, strategy):
    assert job("synchronised", strategy=strategy) == [False, False, True, False, False, True]


def test_ddp_has_its_last_buckets_from_the_first_iteration_on(job):
    """With the whole model in one exchange, nothing would overlap with the backward until torch rebuilds its buckets."""
    found = job("buckets", strategy=ddp(bucket_cap_mb=0.0005))
    assert len(found["sizes"].split(",")) > 2
    assert not found["moved"], "buckets were cut again in training"


def test_ddp_refuses_to_train_where_gradients_cannot_be_exchanged(job):
    message = job("refused", strategy=ddp(), model={"type": "UnusedLayer", "ranks": [0, 1]})
    assert message.startswith("RunError: model: extra.weight, extra.bias got no gradient, so "), message
    assert "find_unused_parameters=True" in message


def test_a_gradient_that_one_rank_lacks_ends_the_run(tmp_path):
    """The other rank waits in its backward for an exchange that never comes."""
    model = {"type": "UnusedLayer", "ranks": [1]}
    path = write_config(tmp_path, "run", model=model, custom_imports={"imports": ["strategy_jobs"]})
    statuses, errors, seconds = run(path)
    assert statuses == [1, 1]
    assert first_line(errors[0]).startswith("error: rank 1: model: extra.weight, extra.bias got no gradient")
    assert seconds < SOON


@pytest.mark.parametrize("strategy", [ddp(), fsdp(wrap="TinyBlock")], ids=["ddp", "fsdp"])
def test_no_collective_is_added_to_an_iteration_that_does_not_log(job, strategy):
    counts = job("collectives", strategy=strategy, iterations=17)
    # Entry k is what iteration k + 1 did; 5, 10 and 15 log. The first two look for the others' pace, and in its first
    # five updates FSDP compares what the ranks run.
    first = FIRST if strategy["type"] == "FSDPStrategy" else 2
    assert [number for number, found in enumerate(counts, start=1) if found] == sorted(
        {*range(1, first + 1), 5, 10, 15}
    )


def test_mixed_precision(job):
    plain = job("losses", strategy=fsdp(wrap="TinyBlock"))
    mixed = {"param_dtype": "bfloat16", "reduce_dtype": "float32"}
    found = job("losses", strategy=fsdp(wrap="TinyBlock", mixed_precision=mixed))
    assert found["loss"] != plain["loss"]
    assert found["loss"] == pytest.approx(plain["loss"], rel=0.02)
    assert found["moments"] == ["torch.float32"]


def test_cpu_offload_is_accepted_and_has_no_effect_on_the_cpu(job):
    assert job("losses", strategy=fsdp(cpu_offload=True)) == job("losses", strategy=fsdp())


@pytest.mark.parametrize("strategy", [ddp(), fsdp(wrap="TinyBlock")], ids=["ddp", "fsdp"])
def test_compiled(job, strategy):
    """The graph is traced and split around the wrapper's hooks; what it computes stays the same."""
    plain = job("losses", strategy=strategy)
    found = job("losses", strategy=strategy, compile={"backend": "aot_eager"})
    assert found.pop("loss") == pytest.approx(plain.pop("loss"), rel=1e-5)
    assert found == plain


def test_the_weights_of_an_interval_are_full_tensors(job, tmp_path):
    hook = {"checkpoint": {"type": "CheckpointHook", "weights_interval": 6}}
    expected = job("written_weights", strategy=fsdp(wrap="TinyBlock"), default_hooks=hook)
    found = load_file(tmp_path / "weights" / "iter_6.safetensors")
    assert {name: value.double().sum().item() for name, value in found.items()} == expected


@pytest.mark.parametrize("strategy", [ddp(), fsdp(wrap="TinyBlock")], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_amp(job, strategy, dtype):
    found = job("losses", strategy=strategy, optim_wrapper=amp(dtype=dtype))
    assert found["loss"] == pytest.approx(job("losses", strategy=strategy)["loss"], rel=0.01)
    assert found["update"] == 3


@pytest.mark.parametrize("exponent", range(14, 24, 2))
def test_an_overflow_in_one_shard_skips_the_step_on_all_ranks(job, exponent):
    scale = {"init_scale": 2.0**exponent}
    found = job("losses", strategy=fsdp(), optim_wrapper=amp(dtype="float16", loss_scale=scale))
    assert found == {
        **job("losses", strategy=ddp(), optim_wrapper=amp(dtype="float16", loss_scale=scale)),
        **{"loss": found["loss"]},
    }


def amp(**options):
    base = strategy_jobs.strategy_parts.changes(2)["optim_wrapper"]
    return {**base, "type": "AmpOptimWrapper", **options}
