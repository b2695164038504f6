"""Tensor parallelism on a mesh with FSDP2: the mathematics, resumes and samples of one process."""

import json
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import tensor_parallel_jobs as jobs
import torch
from exactness import assert_same, left_behind
from parts import logged
from ranks import Group
from same_run import assert_same_run

from mmtrain.checkpoint.sharding import collect
from mmtrain.cli.checkpoint import main
from mmtrain.errors import ConfigError
from mmtrain.randomness import seed_generators
from mmtrain.strategies.mesh import mesh_shape
from mmtrain.strategies.tensor_parallel import _OwnDraws

TP2, DP2, SQUARE = {"tp": 2}, {"dp": 2}, {"dp": 2, "tp": 2}
HYBRID = {"replicate": 2, "shard": 1, "tp": 2}


@pytest.fixture(scope="module")
def groups(pair):
    """Groups of processes by size; one of four starts when it is first needed."""
    found = {2: pair}

    def of(size):
        if size not in found:
            found[size] = Group(size)
        return found[size]

    yield of
    if 4 in found:
        found[4].close()


@pytest.fixture(scope="module")
def train(groups):
    """Trains on ``world`` processes; the ranks of one copy of the model must end with the same full parameters."""

    def start(mesh, work_dir, world=None, **options):
        tp = (mesh or {}).get("tp", 1)
        world = world or (1 if mesh is None else 4 if len(mesh) > 1 else 2)
        if world == 1:
            jobs.train(str(work_dir), **options)
            return
        digests = groups(world).run("tensor_parallel_jobs", "train", work_dir=str(work_dir), mesh=mesh, **options)
        assert all(digests[rank] == digests[rank - rank % tp] for rank in range(world)), "replicas drifted apart"

    return start


@pytest.fixture(scope="module")
def reference(train, tmp_path_factory):
    """What one process does, by iterations."""
    folders = {}

    def of(iterations):
        if iterations not in folders:
            folders[iterations] = tmp_path_factory.mktemp("reference")
            train(None, folders[iterations], iterations=iterations)
        return folders[iterations]

    return of


# ---- the same mathematics ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "mesh", [TP2, *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in (SQUARE, HYBRID))], ids=str
)
def test_the_same_mathematics_as_one_process(train, reference, tmp_path, mesh):
    """50 updates with clipping, accumulation, multipliers, tied and frozen weights, biases, averages and validation."""
    train(mesh, tmp_path, iterations=100)
    assert_same_run(tmp_path, reference(100))


VARIANTS = {
    "recompute": {"strategy": {"activation_checkpointing": "Block"}},
    "root": {"strategy": {"wrap": None}},
    "rotary": {"model": {"positions": "rotary", "width": 12}},
    "clip-value": {"optim_wrapper": {"accumulative_counts": 2, "optimizer": {"type": "AdamW", "lr": 0.01},
                                     "clip_grad": {"type": "value", "clip_value": 0.01}}},
    "foreach": {"optim_wrapper": {"accumulative_counts": 2, "clip_grad": {"max_norm": 0.1, "norm_type": 3},
                                  "optimizer": {"type": "AdamW", "lr": 0.01, "foreach": True, "fused": False}}},
    "no-reshard": {"strategy": {"reshard_after_forward": False}},
    "skip": {"train_cfg": {"max_iters": 40, "val_interval": 20, "nonfinite": "skip"}},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_options_do_not_change_results(train, tmp_path, name):
    options = {"iterations": 40, **VARIANTS[name]}
    alone = {key: value for key, value in options.items() if key != "strategy"}
    train(None, tmp_path / "one", **alone)
    train(TP2, tmp_path / "two", **options)
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"strategy": {"mixed_precision": {"param_dtype": "bfloat16", "reduce_dtype": "float32"}}},
        {"optim_wrapper": {"type": "AmpOptimWrapper", "dtype": "bfloat16", "optimizer": {"type": "AdamW", "lr": 0.01}}},
    ],
    ids=["parameters", "autocast"],
)
def test_bfloat16(train, tmp_path, options):
    for name, mesh in (("tp", TP2), ("dp", DP2)):
        train(mesh, tmp_path / name, iterations=20, **options)
    found, expected = (logged(tmp_path / name, "loss") for name in ("tp", "dp"))
    assert found == {step: pytest.approx(values, rel=0.02) for step, values in expected.items()}


def test_an_overflow_in_one_part_skips_the_step_on_all_ranks(groups, tmp_path):
    assert groups(2).run("tensor_parallel_jobs", "updates", work_dir=str(tmp_path), mesh=TP2) == [5, 5]


def test_a_metric_counts_each_sample_once(groups, tmp_path):
    evaluator = {"val_evaluator": {"type": "TokenCount"}}
    alone = jobs.validated(str(tmp_path / "one"), **evaluator)
    for found in groups(2).run(
        "tensor_parallel_jobs", "validated", work_dir=str(tmp_path / "two"), mesh=TP2, **evaluator
    ):
        assert found == pytest.approx(alone, rel=1e-6)
    assert alone["samples"] == 21


# ---- resume ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mesh", [TP2, pytest.param(SQUARE, marks=pytest.mark.slow)], ids=str)
def test_a_resume_is_exact(train, tmp_path, mesh):
    """Interrupted inside a window after a checkpoint in the middle of an epoch, with dropout in and outside of split layers."""
    options = {"dropout": 0.2, "iterations": 24}
    train(mesh, tmp_path / "uninterrupted", **options)
    train(mesh, tmp_path / "broken", crash=["iteration", 19], **options)
    train(mesh, tmp_path / "broken", **options)
    assert_same(left_behind(tmp_path / "uninterrupted"), left_behind(tmp_path / "broken"))


MOVES = [((None, 1), (TP2, 2)), ((TP2, 2), (DP2, 2))]
SLOW_MOVES = [
    ((TP2, 2), (None, 1)), ((DP2, 2), (TP2, 2)), ((SQUARE, 4), (None, 1)), ((None, 1), (SQUARE, 4)),
    ((SQUARE, 4), ({"dp": 4}, 4)), ((SQUARE, 4), (TP2, 2)), ((DP2, 2), (SQUARE, 4)), ((HYBRID, 4), (SQUARE, 4)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("first", "then"), [*MOVES, *(pytest.param(*move, marks=pytest.mark.slow) for move in SLOW_MOVES)], ids=str
)
def test_a_resume_moves_to_another_mesh(train, reference, tmp_path, first, then):
    """Every logged loss is that of the unmoved run."""
    train(first[0], tmp_path, world=first[1], crash=["iteration", 19], iterations=40)
    train(then[0], tmp_path, world=then[1], iterations=40)
    assert_same_run(tmp_path, reference(40))
    second = sorted(tmp_path.glob("*/vis_data/scalars.json"))[1]
    assert json.loads(second.read_text().splitlines()[0])["step"] == 15, "it did not go on behind iter_14"


# ---- samples -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mesh", [TP2, pytest.param(SQUARE, marks=pytest.mark.slow)], ids=str)
def test_each_sample_is_read_once_by_one_copy_of_the_model(groups, tmp_path, capsys, mesh):
    """97 samples, two epochs of 13 iterations, the last of one sample: with two copies one rank has a stand-in."""
    world = 2 * mesh.get("dp", 1)
    read = groups(world).run("tensor_parallel_jobs", "read", work_dir=str(tmp_path), mesh=mesh)
    assert all(read[rank] == read[rank - rank % 2] for rank in range(world)), "ranks of one copy read the same"
    counts = Counter(number for own in read[::2] for number in own)
    stand_ins = 0 if world == 2 else 2
    assert sorted(counts) == list(range(97))
    assert sum(counts.values()) == 2 * 97 + stand_ins
    assert main(["audit", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "samples lost: 0, repeated: 0"


def test_ranks_of_one_copy_that_read_different_samples_are_found(groups, tmp_path):
    (message, _) = groups(2).run("tensor_parallel_jobs", "refused", work_dir=str(tmp_path), mesh=TP2, own_samples=True)
    assert message.startswith("RunError: the gradients of ")
    assert "mmtrain.dist.data_rank()" in message


# ---- what is saved -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "mesh", [TP2, SQUARE, {"dp": 3, "tp": 2}, HYBRID, {"replicate": 2, "shard": 3, "tp": 2}], ids=str
)
def test_the_written_shards_are_the_tensors(mesh):
    """Every rank's part of every parameter is at its place, and the written parts cover it once."""
    world = math.prod(mesh.values())
    full, pieces = None, {}
    threads = [ThreadPoolExecutor(1) for _ in range(world)]  # torch keeps what it knows of meshes apart by thread
    for rank, thread in enumerate(threads):
        full, held = thread.submit(boxes_of, rank, world, mesh).result()
        for piece, writes in zip(held.shards, held.is_writer, strict=True):
            place = tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.tensor.shape, strict=True))
            assert torch.equal(piece.tensor, full[piece.name][place]), f"{piece.name} on rank {rank}"
            if writes and piece.name not in held.aliases:
                pieces.setdefault(piece.name, torch.zeros(piece.shape))[place] += 1
    for thread in threads:
        thread.shutdown()
    assert pieces.keys() == full.keys() - {"head.weight"}
    assert all(bool((written == 1).all()) for written in pieces.values())


def boxes_of(rank, world, mesh):
    """What rank ``rank`` of a simulated world would hold."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from mmtrain.strategies.tensor_parallel import parallelise, plan_for

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        torch.manual_seed(0)
        model = jobs.TinyGPT()
        full = {name: value.clone() for name, value in model.state_dict().items()}
        shape = mesh_shape(mesh, world)
        both = init_device_mesh("cpu", tuple(shape.values()), mesh_dim_names=tuple(shape))
        parallelise(model, both["tp"], plan_for(model, None, 2))
        fully_shard(model, mesh=both[tuple(name for name in shape if name != "tp")])
        return full, collect("model", model.state_dict(), writers={}, rank=rank)
    finally:
        torch.distributed.destroy_process_group()


def test_built_without_memory_the_weights_do_not_depend_on_the_mesh(groups, tmp_path):
    def weights(mesh):
        options = {"strategy": {"meta_init": True}}
        return groups(2).run("tensor_parallel_jobs", "initial_weights", work_dir=str(tmp_path), mesh=mesh, **options)

    assert weights(TP2) == weights(DP2)


# ---- dropout -----------------------------------------------------------------------------------------------------------
def draws(rank):
    """Draws before, in, between and after two pairs of a plan, as a rank would make them."""
    seed_generators(7)
    own, layer, output = _OwnDraws(rank), torch.nn.Linear(1, 1), torch.zeros(1)
    found = [torch.rand(3)]
    for parent, layers in (("attention", 3), ("mlp", 1)):
        for _ in range(layers):
            own.entering(parent)(layer, (), output)
        found.append(torch.rand(3))
        own.leave()
        found.append(torch.rand(3))
    return found


def test_dropout_differs_between_ranks_only_where_activations_are_split():
    first, second, again = draws(0), draws(1), draws(0)
    assert [torch.equal(a, b) for a, b in zip(first, second, strict=True)] == [True, False, True, False, True]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({tuple(value.tolist()) for value in (*first, *second)}) == 7, "some draws are repeated"


def test_recomputed_activations_have_the_same_dropout(train, tmp_path):
    options = {"dropout": 0.2, "iterations": 8}
    train(TP2, tmp_path / "kept", **options)
    train(TP2, tmp_path / "recomputed", **options, strategy={"activation_checkpointing": "Block"})
    assert logged(tmp_path / "recomputed", "loss") == logged(tmp_path / "kept", "loss")


# ---- what is refused ---------------------------------------------------------------------------------------------------
HEADS3 = {"heads": 3, "width": 12}
OWN_SAMPLER = {"dataset": {"type": "GPTTokens", "size": 21}, "batch_size": 8, "sampler": {"type": "RankDividedSampler"}}


@pytest.mark.parametrize(
    ("mesh", "options", "words"),
    [
        ({"dp": 2, "tp": 2}, {}, ["strategy.mesh", "dp 2 x tp 2 makes 4 processes, but 2 were started"]),
        (TP2, {"model": HEADS3}, ["strategy.mesh.tp", "3 heads", "2 processes"]),
        (TP2, {"strategy": {"tensor_parallel": {"blocks.*.mlp.dwon": "rowwise"}}}, ["'blocks.*.mlp.dwon'", "no module"]),
        (TP2, {"strategy": {"tensor_parallel": {"blocks.*.mlp.up": "columns"}}}, ["'columns'", "'colwise' or 'rowwise'"]),
        (TP2, {"strategy": {"tensor_parallel": {"head": "colwise"}}}, ["embed.weight and head.weight are one parameter"]),
        (TP2, {"strategy": {"tensor_parallel": {"norm": "colwise"}}}, ["norm is a LayerNorm", "only Linear"]),
        (TP2, {"strategy": {"tensor_parallel": {}}}, ["the plan is empty"]),
        (DP2, {"strategy": {"tensor_parallel": {"head": "colwise"}}}, ["strategy.tensor_parallel", "mesh=dict(tp=2)"]),
        (TP2, {"model": {"type": "TinyLanguageModel"}, "strategy": {"wrap": None}}, ["TinyLanguageModel has no tensor_parallel_plan()", "give a plan"]),
        (TP2, {"compile": True}, ["compile", "strategy.mesh.tp"]),
        (TP2, {"val_dataloader": OWN_SAMPLER}, ["val_dataloader.sampler", "RankDividedSampler", "'DefaultSampler'"]),
        (TP2, {"val_evaluator": {"type": "GathersItself"}}, ["GathersItself", "val_evaluator", "compute_metrics"]),
    ],
)  # fmt: skip
def test_refused_in_one_sentence(groups, tmp_path, mesh, options, words):
    message, other = groups(2).run("tensor_parallel_jobs", "refused", work_dir=str(tmp_path), mesh=mesh, **options)
    assert message == other
    assert message.startswith("ConfigError: ")
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_a_layer_that_cannot_be_divided_is_refused(groups, tmp_path):
    plan = {
        "strategy": {
            "tensor_parallel": {"blocks.*.mlp.up": "colwise", "blocks.*.mlp.down": "rowwise", "odd": "colwise"}
        }
    }
    message, _ = groups(2).run(
        "tensor_parallel_jobs", "refused", work_dir=str(tmp_path), mesh=TP2, model={"type": "OddGPT"}, **plan
    )
    assert "the 7 outputs of odd cannot be divided among 2 processes" in message


def test_a_parameter_between_split_layers_is_found(groups, tmp_path):
    model = {"type": "ScaledGPT"}
    (message, _) = groups(2).run("tensor_parallel_jobs", "refused", work_dir=str(tmp_path), mesh=TP2, model=model)
    assert message.startswith("RunError: the gradients of blocks.0.mlp.scale differ")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"tp": 3}, "dp 1 x tp 3 makes 3 processes, but 4 were started"),
        ({"pp": 2}, "strategy.mesh.pp: pipeline parallelism is not supported"),
        ({"pipeline_stage": 2}, "strategy.mesh.pipeline_stage: pipeline parallelism is not supported"),
        ({"model_parallel": 2}, "strategy.mesh.model_parallel: is called tp here: write strategy.mesh=dict(tp=...)"),
        ({"data_parallel": 2}, "strategy.mesh.data_parallel: is called dp here"),
        ({"dp": 2, "shard": 2}, "strategy.mesh.dp: found beside 'shard'"),
        ({"tp": 0}, "strategy.mesh.tp is 0"),
        ({"cp": 2}, "strategy.mesh.cp: unknown dimension"),
    ],
)
def test_an_impossible_mesh_is_refused(asked, words):
    with pytest.raises(ConfigError) as message:
        mesh_shape(asked, 4)
    assert words in str(message.value)


@pytest.mark.parametrize(
    ("asked", "shape"),
    [
        ({}, {"shard": 4}),
        ({"tp": 2}, {"dp": 2, "tp": 2}),
        ({"tp": 4}, {"dp": 1, "tp": 4}),
        ({"dp": 2, "tp": 2}, {"dp": 2, "tp": 2}),
        ({"tp": 1}, {"shard": 4}),
        ({"dp": 4}, {"dp": 4}),
        ({"replicate": 2}, {"replicate": 2, "shard": 2}),
        ({"replicate": 2, "tp": 2}, {"replicate": 2, "shard": 1, "tp": 2}),
        ({"shard": 2, "tp": 2}, {"shard": 2, "tp": 2}),
    ],
)
def test_what_a_mesh_leaves_out_is_computed(asked, shape):
    assert list(mesh_shape(asked, 4).items()) == list(shape.items())


def test_the_log_of_a_group_names_its_mesh(groups, tmp_path):
    train_log = groups(2).run("tensor_parallel_jobs", "opening", work_dir=str(tmp_path), mesh=TP2)[0]
    assert "2 processes as dp 1 x tp 2" in train_log
    assert logged(tmp_path, "loss") == {}
