"""DeepSpeed's engine from inside, and the real command with it."""

import json
import sys
from importlib.util import find_spec

import pytest
import strategy_jobs
from commands import SOON, first_line, run, write_config
from exactness import assert_same, left_behind
from parts import logged

from mmtrain.cli import train as train_command
from mmtrain.errors import ConfigError
from mmtrain.strategies.zero import library

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is optional and not installed")


def zero(stage, **options):
    return {"type": "DeepSpeedStrategy", "zero_optimization": {"stage": stage}, **options}


@pytest.fixture
def job(pair, tmp_path):
    """Runs a job; what both ranks give is the same."""

    def start(function, name="run", **kwargs):
        results = pair.run("strategy_jobs", function, work_dir=str(tmp_path / name), **kwargs)
        assert results[0] == results[1]
        return results[0]

    return start


def assert_near(folder, *names, steps=None):
    expected, found = (logged(folder / name, *names) for name in ("one", "run"))
    for step in steps or expected:
        assert found[step] == pytest.approx(expected[step], rel=1e-5), step


OPTIMIZER = {"type": "SGD", "lr": 0.1}


@pytest.mark.parametrize(
    ("strategy", "changes", "words"),
    [
        (zero(2, gradient_clipping=1.0), {}, ["strategy.gradient_clipping is 1.0", "optim_wrapper.clip_grad"]),
        (zero(2, gradient_accumulation_steps=4), {}, ["optim_wrapper.accumulative_counts` is 2"]),
        ({"type": "DeepSpeedStrategy", "zero_optimization": {"stag": 2}}, {}, ["zero_optimization.stag", "'stage'"]),
        (zero(0, fp16={"enabled": True}), {}, ["strategy.fp16", "stage=1"]),
        (
            zero(2),
            {"optim_wrapper": {"optimizer": {"type": "Adagrad", "lr": 0.1}}},
            ["Adagrad", "without the groups"],
        ),
        (
            zero(2),
            {"model": {"type": "Scaled"}},
            ["model: temperature is a parameter without dimensions", "DDPStrategy"],
        ),
        (zero(2), {"model": {"type": "TrainsItself"}}, ["has its own train_step", "DeepSpeedStrategy"]),
    ],
)
def test_refused_in_one_sentence(job, strategy, changes, words):
    message = job("refused", strategy=strategy, **changes)
    assert message.startswith("ConfigError: "), message
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("stage", "iterations"),
    [
        (2, 8),
        (0, 7),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(0, 8), (1, 7), (2, 7), (3, 7), (3, 8)]),
    ],
)
def test_a_short_last_window_is_flushed(job, tmp_path, stage, iterations):
    """Windows of 3: the last one has two iterations, or one whose loss nothing has divided; it has the right divisor."""
    train_cfg = {"max_iters": iterations}
    strategy_jobs.make(str(tmp_path / "one"), 1, accumulation=3, train_cfg=train_cfg).train()
    found = job("losses", strategy=zero(stage), accumulation=3, train_cfg=train_cfg)
    assert found["update"] == 3
    assert_near(tmp_path, "loss", "lr")
    assert_near(tmp_path, "grad_norm", steps=[3, 6, iterations])


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_half_precision_is_near(job, tmp_path, stage):
    plain = job("losses", "plain", strategy=zero(stage))
    half = job("losses", "half", strategy=zero(stage, bf16={"enabled": True}))
    assert half["loss"] == pytest.approx(plain["loss"], rel=0.02)
    assert half["loss"] != plain["loss"]
    assert half["moments"] == ["torch.float32"]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [OPTIMIZER, {**OPTIMIZER, "momentum": 0.9}, {"type": "RMSprop", "lr": 0.01}])
@pytest.mark.parametrize("stage", [1, 3])
def test_other_optimizers_step_the_same(job, tmp_path, stage, optimizer):
    changes = {"optim_wrapper": {"optimizer": optimizer, "paramwise_cfg": {"custom_keys": {"up": {"lr_mult": 0.3}}}}}
    strategy_jobs.make(str(tmp_path / "one"), 1, **changes).train()
    job("losses", strategy=zero(stage), **changes)
    assert_near(tmp_path, "loss")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_in_float16_skipped_steps_do_not_count_and_the_scale_is_resumed(job, tmp_path, stage):
    options = {"stage": stage, "scale_power": 22, "iterations": 40}
    job("train_in_fp16", "uninterrupted", **options)
    job("train_in_fp16", "broken", crash=["iteration", 23], **options)
    job("train_in_fp16", "broken", **options)
    uninterrupted = left_behind(tmp_path / "uninterrupted")
    assert_same(uninterrupted, left_behind(tmp_path / "broken"))
    assert uninterrupted["position"]["skipped"] > 0, "no step overflowed, so the test says nothing"
    assert uninterrupted["position"]["skipped"] < 40
    losses = logged(tmp_path / "uninterrupted", "loss")
    assert losses[40][0] < losses[1][0]


def test_inputs_become_half_by_name(job):
    strategy = zero(1, bf16={"enabled": True}, inputs_to_half=["noise"])
    assert job("input_types", strategy=strategy) == {"tokens": "torch.int64", "noise": "torch.bfloat16"}


# ---- the command -----------------------------------------------------------------------------------------------------
def test_the_command_prints_only_its_own_lines(tmp_path, capfd):
    path = write_config(tmp_path, "quiet", train_cfg={"max_iters": 8, "val_interval": 8})
    statuses, errors, _ = run(path, "--deepspeed", "zero2")
    assert statuses == [0, 0], errors
    assert capfd.readouterr().out == ""
    assert errors[1] == ""
    foreign = [line for line in errors[0].splitlines() if " - mmtrain - " not in line]
    assert foreign == []
    assert "DeepSpeed" not in errors[0]
    assert (tmp_path / "quiet" / "iter_8.pth" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").exists()


def test_a_misspelt_key_of_the_file_is_reported_only_by_rank_0(tmp_path):
    path = write_config(tmp_path, "bad")
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimisation": {"stage": 2}}))
    statuses, errors, seconds = run(path, "--deepspeed", str(tmp_path / "ds.json"))
    assert statuses == [2, 2], errors
    assert errors[1] == ""
    assert "ds.json: zero_optimisation" in first_line(errors[0])
    assert "did you mean 'zero_optimization'" in first_line(errors[0])
    assert seconds < SOON


def options(path, *more):
    return train_command.config_from(train_command.make_parser().parse_args([str(path), *more]))


def test_presets_and_files_become_the_strategy(tmp_path):
    path = write_config(tmp_path, "some")
    strategy = options(path, "--deepspeed", "zero3_offload").strategy
    assert strategy.type == "DeepSpeedStrategy"
    assert strategy.config.zero_optimization.offload_param.device == "cpu"
    (tmp_path / "ds.json").write_text("{}")
    assert options(path, "--deepspeed", str(tmp_path / "ds.json")).strategy.config == str(tmp_path / "ds.json")


@pytest.mark.parametrize(
    ("strategy", "words"),
    [({"type": "FSDPStrategy"}, "strategy.type='FSDPStrategy'"), (zero(2, config={}), "strategy.config")],
)
def test_the_flag_does_not_override_another_choice(tmp_path, strategy, words):
    path = write_config(tmp_path, "some", strategy=strategy)
    with pytest.raises(ConfigError, match="--deepspeed zero2 contradicts") as caught:
        options(path, "--deepspeed", "zero2")
    assert words in str(caught.value)


def test_without_the_package_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.delitem(sys.modules, "deepspeed")
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="needs the package deepspeed, which is not installed"):
        library.load()
