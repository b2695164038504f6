"""From a config to a run: sections, their defaults, and what is refused."""

import json
import multiprocessing
import os

import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from parts import config, logged, make_runner

from mmtrain.config import load_config
from mmtrain.errors import ConfigError
from mmtrain.registry import LOOPS, METRICS
from mmtrain.runner import FlexibleRunner, TrainLoop


@METRICS.register_module()
class Share(BaseMetric):
    """The share of positive predictions."""

    def process(self, data_batch, data_samples):
        self.results.append(sum(sample["positive"] for sample in data_samples))

    def compute_metrics(self, results):
        return {"share": sum(results) / 20}


class MmModel(BaseModel):
    """MMEngine's way: one forward with three modes, a preprocessor, predictions for metrics."""

    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(6, 2)

    def forward(self, x, y, mode="tensor"):
        out = self.line(x)
        if mode == "loss":
            return {"loss_ce": torch.nn.functional.cross_entropy(out, y)}
        return [{"positive": int(row.argmax())} for row in out]


def test_a_base_model_with_a_metric(tmp_path):
    runner = make_runner(tmp_path, model=MmModel(), val_evaluator={"type": "Share", "prefix": "my"})
    runner.train()
    assert set(runner.metrics) == {"my/share"}
    assert 0 <= runner.metrics["my/share"] <= 1
    assert {len(value) for value in logged(tmp_path, "loss", "loss_ce").values()} == {2}


def test_a_base_model_without_a_metric_validates_its_loss(tmp_path):
    runner = make_runner(tmp_path, model=MmModel())
    runner.train()
    assert set(runner.metrics) == {"loss", "loss_ce"}


def test_the_written_config_gives_the_same_run(tmp_path):
    path = tmp_path / "config.py"
    cfg = config(tmp_path / "first")
    path.write_text("custom_imports = dict(imports=['parts'])\n" + "".join(f"{k} = {v!r}\n" for k, v in cfg.items()))
    first = FlexibleRunner.from_cfg(load_config(path, {"train_cfg.max_iters": 9}))
    first.train()
    written = f"{first.log_dir}/config.py"
    second = FlexibleRunner.from_cfg(load_config(written, {"work_dir": str(tmp_path / "second")}))
    second.train()
    assert logged(tmp_path / "first", "loss", "lr") == logged(tmp_path / "second", "loss", "lr")
    assert len(logged(tmp_path / "second", "loss")) == 9


class ChangeDirectory:
    """User's code that changes the current directory."""

    def __init__(self, there):
        self.there = there

    def before_run(self, runner):
        os.chdir(self.there)


@pytest.mark.parametrize("out_dir", [None, "out"])
def test_relative_directories_are_relative_to_the_start(tmp_path, monkeypatch, out_dir):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    hooks = {"checkpoint": {"type": "CheckpointHook", "interval": 7, "out_dir": out_dir}}
    for max_iters in (7, 14):
        monkeypatch.chdir(here)
        changes = {
            "default_hooks": hooks,
            "custom_hooks": [ChangeDirectory(there)],
            "train_cfg": {"max_iters": max_iters},
        }
        make_runner("work", resume=True, **changes).train()
    assert not any(there.iterdir())
    assert {path.name for path in (here / (out_dir or "") / "work").glob("iter_*")} == {"iter_7.pth", "iter_14.pth"}
    assert sorted(logged(here / "work")) == list(range(1, 15))


def test_val_and_test_without_training(tmp_path):
    make_runner(tmp_path / "train").train()
    cfg = config(tmp_path / "eval", load_from=str(tmp_path / "train" / "iter_20.pth"))
    cfg["test_dataloader"] = cfg["val_dataloader"]
    tested = FlexibleRunner.from_cfg(Config(cfg), task="test").test()
    validated = FlexibleRunner.from_cfg(Config(cfg), task="val").val()
    assert tested == validated
    last = logged(tmp_path / "train", "loss", mode="val")[20]
    assert tested["loss"] == last[0]


def test_evaluation_without_weights_is_refused(tmp_path):
    cfg = config(tmp_path)
    cfg["test_dataloader"] = cfg["val_dataloader"]
    with pytest.raises(ConfigError, match="test needs weights"):
        FlexibleRunner.from_cfg(Config(cfg), task="test")


@pytest.mark.parametrize("missing", ["model", "optim_wrapper"])
def test_a_missing_section_is_named(tmp_path, missing):
    cfg = config(tmp_path)
    del cfg[missing]
    with pytest.raises(ConfigError, match=f"no '{missing}'"):
        FlexibleRunner.from_cfg(Config(cfg))


def test_an_evaluator_without_data_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="val_evaluator is set without val_dataloader"):
        make_runner(tmp_path, val_dataloader=None, val_evaluator={"type": "Share"})


@pytest.mark.parametrize(
    ("train_cfg", "message"),
    [
        ({"by_epoch": True, "max_iters": None}, "needs train_cfg.max_epochs"),
        ({"by_epoch": True, "max_epochs": 2}, "has both max_epochs and max_iters; remove one"),
    ],
)
def test_an_end_that_cannot_be_determined(tmp_path, train_cfg, message):
    with pytest.raises(ConfigError, match=message):
        make_runner(tmp_path, train_cfg=train_cfg)


class Endless(torch.utils.data.IterableDataset):
    """Numbers without end, with a position in its state."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        while True:
            self.at += 1
            yield {"x": torch.full((6,), float(self.at % 7)), "y": torch.tensor(self.at % 2)}

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def test_an_iterable_dataset_has_no_epochs(tmp_path):
    with pytest.raises(ConfigError, match=r"max_epochs.*max_iters"):
        make_runner(
            tmp_path, train_dataloader={"dataset": Endless()}, train_cfg={"by_epoch": True, "max_iters": None, "max_epochs": 2}
        )  # fmt: skip


def test_an_iterable_dataset_resumes_at_its_position(tmp_path):
    def run(folder, **changes):
        seen = {}

        class Seen:
            def before_train_iter(self, runner, batch_idx, data_batch=None):
                seen[runner.iter] = data_batch["x"][:, 0].tolist()

        make_runner(
            tmp_path / folder, train_dataloader={"dataset": Endless()}, custom_hooks=[Seen()], **changes
        ).train()
        return seen

    uninterrupted = run("uninterrupted")
    first = run("cut", train_cfg={"max_iters": 7})
    rest = run("cut", resume=True)
    assert first == {step: uninterrupted[step] for step in range(7)}
    assert rest == {step: uninterrupted[step] for step in range(7, 20)}


def test_the_priority_of_a_hook_can_be_set_in_the_config(tmp_path):
    hooks = [{"type": "Journal"}, {"type": "Counter", "priority": "VERY_HIGH"}]
    runner = make_runner(tmp_path, custom_hooks=hooks)
    names = list(runner.hooks.named)
    assert names.index("Counter") < names.index("Journal")
    assert names[0] in ("Counter", "runtime_info")
    runner.release()


def test_a_default_hook_can_be_changed_or_removed(tmp_path):
    runner = make_runner(tmp_path, default_hooks={"logger": {"interval": 3}, "timer": None})
    assert runner.hooks.named["logger"].interval == 3
    assert "timer" not in runner.hooks.named
    runner.release()


@LOOPS.register_module()
class Counted(TrainLoop):
    """A user's loop."""

    steps = 0

    def _step(self):
        Counted.steps += 1
        super()._step()


class Foreign:
    pass


def test_a_users_loop(tmp_path):
    Counted.steps = 0
    make_runner(tmp_path, train_cfg={"type": "Counted", "max_iters": 3}).train()
    assert Counted.steps == 3
    with pytest.raises(ConfigError, match="is not an mmtrain train loop"):
        make_runner(tmp_path / "b", train_cfg={"type": Foreign})


@pytest.mark.parametrize("name", ["EpochBasedTrainLoop", "TrainLoop"])
def test_mmengines_loops_are_names_of_the_train_loop(tmp_path, name):
    runner = make_runner(tmp_path, train_cfg={"type": name, "max_iters": None, "max_epochs": 1, "by_epoch": True})
    assert type(runner.train_loop) is TrainLoop
    runner.release()


def test_auto_scale_lr(tmp_path):
    runner = make_runner(tmp_path, auto_scale_lr={"enable": True, "base_batch_size": 32, "rule": "sqrt"})
    assert runner.optim_wrapper.param_groups[0]["initial_lr"] == pytest.approx(0.005)
    assert any("square" in notice or "sqrt" in notice for notice in runner.notices), runner.notices
    runner.release()


def test_compile_does_not_change_names_and_results(tmp_path):
    plain = make_runner(tmp_path / "plain").train()
    compiled = make_runner(tmp_path / "compiled", compile={"backend": "eager"}).train()
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    assert logged(tmp_path / "plain", "loss") == logged(tmp_path / "compiled", "loss")
    with pytest.raises(ConfigError, match=r"compile\.target"):
        make_runner(tmp_path / "c", compile={"target": "train_step"})


def test_env_cfg(tmp_path):
    before = multiprocessing.get_start_method()
    make_runner(tmp_path, env_cfg={"cudnn_benchmark": True, "mp_cfg": {"mp_start_method": "fork"}}).release()
    assert torch.backends.cudnn.benchmark
    with pytest.raises(ConfigError, match="mp_start_method is 'spoon'"):
        make_runner(tmp_path / "b", env_cfg={"mp_cfg": {"mp_start_method": "spoon"}})
    assert not torch.backends.cudnn.benchmark
    multiprocessing.set_start_method(before, force=True)


def test_deterministic(tmp_path):
    make_runner(tmp_path, randomness={"deterministic": True}).release()
    assert torch.are_deterministic_algorithms_enabled()
    make_runner(tmp_path / "b").release()
    assert not torch.are_deterministic_algorithms_enabled()


def test_tensorboard_through_the_visualizer(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    visualizer = {"type": "Visualizer", "vis_backends": [{"type": "TensorboardVisBackend"}]}
    runner = make_runner(tmp_path, visualizer=visualizer)
    runner.train()
    events = EventAccumulator(f"{runner.log_dir}/vis_data")
    events.Reload()
    points = {event.step: event.value for event in events.Scalars("loss")}
    assert points == {step: pytest.approx(value) for step, (value,) in logged(tmp_path, "loss").items()}
    assert [event.step for event in events.Scalars("val/loss")] == [10, 20]


def test_a_log_line_has_everything(tmp_path):
    make_runner(tmp_path).train()
    path = next(tmp_path.glob("*/vis_data/scalars.json"))
    first = json.loads(path.read_text().splitlines()[0])
    assert {
        "mode",
        "step",
        "epoch",
        "iter",
        "lr",
        "loss",
        "accuracy",
        "time",
        "data_time",
        "memory",
        "grad_norm",
    } <= set(first)
    assert repr(first["loss"]) == str(first["loss"])
