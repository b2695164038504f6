import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmtrain.errors import ConfigError
from mmtrain.hooks import LoggerHook
from mmtrain.hooks.logger import epoch_of, learning_rates, memory_megabytes
from mmtrain.logging import JsonLinesWriter, ScalarReader
from mmtrain.progress import Progress
from mmtrain.runner.hook_points import HookList


def start(hook, runner, *others):
    runner.hooks = HookList([("logger", hook), *(("LoggerHook", other) for other in others)])
    runner.hooks.call("before_run", runner)
    runner.hooks.call("before_train", runner)
    return hook


def train(hook, runner, count):
    """Iteration n has loss n and lr n / 10; as in the loop, the next one's lr is set when the hooks run."""
    group = runner.optim_wrapper.param_groups[0]
    group["lr"] = (runner.progress.iteration + 1) / 10
    runner.set_schedule = lambda: group.update(lr=(runner.progress.iteration + 1) / 10)
    for _ in range(count):
        done = runner.progress.iteration + 1
        runner.scalars.record("loss", torch.tensor(float(done)))
        runner.scalars.record("time", 0.2)
        runner.scalars.record("data_time", 0.05)
        runner.step(*runner.hooks)


def test_a_line_every_interval_and_at_the_end(make_runner):
    runner = make_runner(per_epoch=5, max_epochs=5)
    train(start(LoggerHook(interval=10), runner), runner, 25)
    lines = [(step, line["loss"], line["epoch"], line["iter"]) for _, step, line, _ in runner.recorder.lines]
    assert lines == [(10, 5.5, 2, 10), (20, 15.5, 4, 20), (25, 23.0, 5, 25)]
    _, _, line, text = runner.recorder.lines[0]
    assert set(line) == {"epoch", "iter", "lr", "loss", "time", "data_time", "memory"}
    assert isinstance(line["memory"], int)
    assert re.fullmatch(
        r"Epoch\(train\) \[2\]\[5/5\]  lr: 1\.0000e\+00  eta: 0:00:\d\d  time: 0\.2000  data_time: 0\.0500  "
        r"memory: \d+  loss: 5\.5000",
        text,
    ), text


def test_the_lr_is_the_one_that_the_iteration_used(make_runner):
    runner = make_runner()
    train(start(LoggerHook(interval=4), runner), runner, 20)
    assert [line["lr"] for _, _, line, _ in runner.recorder.lines] == [0.4, 0.8, 1.2, 1.6, 2.0]


def test_lines_by_iteration(make_runner):
    runner = make_runner(by_epoch=False)
    train(start(LoggerHook(interval=10), runner), runner, 10)
    assert runner.recorder.lines[0][3].startswith("Iter(train) [10/20]  ")


def test_the_log_processor_of_the_config_decides_the_form(make_runner):
    runner = make_runner()
    runner.cfg = {"log_processor": {"by_epoch": False, "num_digits": 2}}
    train(start(LoggerHook(), runner), runner, 10)
    assert runner.recorder.lines[0][3].endswith("loss: 5.50")
    assert runner.recorder.lines[0][3].startswith("Iter(train) [10/20]")


def test_ignore_last_false_writes_the_rest_of_each_epoch(make_runner):
    runner = make_runner(per_epoch=5, max_epochs=3)
    train(start(LoggerHook(interval=4, ignore_last=False), runner), runner, 15)
    found = [(step, line["loss"], line["lr"]) for _, step, line, _ in runner.recorder.lines]
    assert found == [
        (4, 2.5, 0.4), (5, 5.0, 0.5), (8, 7.0, 0.8), (10, 9.5, 1.0), (12, 11.5, 1.2), (15, 14.0, 1.5),
    ]  # fmt: skip


def test_an_interval_interrupted_by_a_restart_gives_the_same_line(make_runner):
    uninterrupted = make_runner()
    train(start(LoggerHook(interval=10), uninterrupted), uninterrupted, 20)
    first = make_runner()
    train(start(LoggerHook(interval=10), first), first, 13)
    second = make_runner()
    second.progress.load_state_dict(first.progress.state_dict())
    second.scalars.load_state_dict(json.loads(json.dumps(first.scalars.state_dict())))
    train(start(LoggerHook(interval=10), second), second, 7)

    def values(runner):
        return [(step, {**line, "memory": 0}) for _, step, line, _ in runner.recorder.lines]

    assert values(first) + values(second) == values(uninterrupted)


def test_the_eta_counts_only_this_process(make_runner):
    runner = make_runner(per_epoch=50, max_epochs=4)
    runner.progress.iteration = runner.progress.epoch_iteration = 20
    hook, now = LoggerHook(interval=10), [1000.0]
    hook.clock = lambda: now[0]
    start(hook, runner)
    now[0] += 30
    train(hook, runner, 10)
    assert "eta: 0:08:30" in runner.recorder.lines[0][3]  # 170 iterations at 3 s


def test_val_and_test_lines_have_the_same_step(make_runner):
    runner = make_runner(per_epoch=5)
    hook = start(LoggerHook(interval=5, log_metric_by_epoch=True), runner)
    train(hook, runner, 10)
    hook.after_val_epoch(runner, metrics={"loss": 1.25, "acc": 0.5})
    hook.after_test_epoch(runner, metrics={"acc": 0.75})
    train_line, val_line, test_line = runner.recorder.lines[-3:]
    assert train_line[1] == val_line[1] == test_line[1] == 10
    assert val_line[2] == {"epoch": 2, "iter": 10, "loss": 1.25, "acc": 0.5}
    assert val_line[3] == "Epoch(val) [2][20/20]  loss: 1.2500  acc: 0.5000"
    assert test_line[3] == "Epoch(test) [7/7]  acc: 0.7500"


def test_validation_without_training(make_runner):
    runner = make_runner()
    runner.train_loop = None
    hook = LoggerHook()
    runner.hooks = HookList([("logger", hook)])
    hook.before_run(runner)
    hook.after_val_epoch(runner, metrics={"acc": 0.5})
    hook.after_run(runner)
    assert runner.recorder.lines == [("val", 0, {"epoch": 0, "iter": 0, "acc": 0.5}, "Epoch(val) [20/20]  acc: 0.5000")]


def test_other_ranks_take_part_and_write_nothing(make_runner):
    runner = make_runner()
    runner.rank = 1
    hook = start(LoggerHook(interval=5), runner)
    train(hook, runner, 5)
    hook.after_val_epoch(runner, metrics={"acc": 1.0})
    assert runner.recorder.lines == []
    assert runner.scalars.latest("loss") == 3.0  # it was read


def test_a_failed_save_is_reported_again_at_every_line(make_runner):
    runner = make_runner()
    runner.checkpointer = SimpleNamespace(failure="the last checkpoint could not be written: disk full")
    train(start(LoggerHook(interval=5), runner), runner, 10)
    assert runner.recorder.warnings == [runner.checkpointer.failure] * 2


def test_the_cost_of_the_last_save_is_written_at_the_end(make_runner):
    runner = make_runner()
    hook = start(LoggerHook(interval=10), runner)
    train(hook, runner, 20)
    runner.scalars.record("save_time", 1.5)
    runner.scalars.record("save_bytes", 34000)
    hook.after_run(runner)
    assert runner.recorder.lines[-1] == ("save", 20, {"iter": 20, "save_time": 1.5, "save_bytes": 34000}, None)


def test_lines_are_written_before_a_checkpoint(make_runner):
    runner = make_runner()
    LoggerHook().before_save_checkpoint(runner, {})
    assert runner.recorder.flushes == 1


def test_the_experiment_is_named(make_runner):
    runner = make_runner()
    hook = start(LoggerHook(interval=7, interval_exp_name=5), runner)
    train(hook, runner, 10)
    assert runner.recorder.infos == ["Exp name: exp"] * 2


def test_two_hooks_log_the_means_of_their_own_intervals(make_runner):
    runner = make_runner(per_epoch=15, max_epochs=1)
    threes = LoggerHook(interval=3, interval_exp_name=15)
    fives = LoggerHook(interval=5, interval_exp_name=15)
    train(start(threes, runner, fives), runner, 15)
    runner.scalars.record("save_time", 1.5)
    runner.hooks.call("after_val_epoch", runner, metrics={"acc": 0.5})
    runner.hooks.call("after_run", runner)
    lines = [(kind, step, line.get("loss"), line.get("lr")) for kind, step, line, _ in runner.recorder.lines]
    assert sorted(line for line in lines if line[0] == "train") == [
        ("train", 3, 2.0, 0.3), ("train", 5, 3.0, 0.5), ("train", 6, 5.0, 0.6), ("train", 9, 8.0, 0.9),
        ("train", 10, 8.0, 1.0), ("train", 12, 11.0, 1.2), ("train", 15, 13.0, 1.5), ("train", 15, 14.0, 1.5),
    ]  # fmt: skip
    assert [kind for kind, *_ in lines if kind != "train"] == ["val", "save"]  # once, by the first hook
    assert runner.recorder.infos == ["Exp name: exp"]


def test_two_hooks_log_the_same_lines_over_a_restart(make_runner):
    def hooks():
        return LoggerHook(interval=3), LoggerHook(interval=5)

    uninterrupted = make_runner()
    first_hook, other = hooks()
    train(start(first_hook, uninterrupted, other), uninterrupted, 20)
    first = make_runner()
    first_hook, other = hooks()
    train(start(first_hook, first, other), first, 13)
    second = make_runner()
    second.progress.load_state_dict(first.progress.state_dict())
    first_hook, other = hooks()
    start(first_hook, second, other)
    second.scalars.load_state_dict(json.loads(json.dumps(first.scalars.state_dict())))
    train(first_hook, second, 7)

    def values(runner):
        return [(step, {**line, "memory": 0}) for _, step, line, _ in runner.recorder.lines]

    assert values(first) + values(second) == values(uninterrupted)


@pytest.mark.parametrize("keep_local", [True, False])
def test_logs_are_copied_to_out_dir(make_runner, tmp_path, keep_local):
    runner = make_runner()
    writer = JsonLinesWriter(Path(runner.log_dir) / "vis_data" / "scalars.json")
    runner.writers.append(writer)
    writer.write({"loss": 1.0}, 1)
    (Path(runner.log_dir) / "weights.bin").write_bytes(b"x")
    hook = LoggerHook(out_dir=tmp_path / "out", keep_local=keep_local)
    start(hook, runner)
    hook.after_run(runner)
    writer.close()
    copy = tmp_path / "out" / "work" / "20260101_000000" / "vis_data" / "scalars.json"
    assert json.loads(copy.read_text())["loss"] == 1.0
    assert not (tmp_path / "out" / "work" / "20260101_000000" / "weights.bin").exists()
    assert writer.path.exists() is keep_local


@pytest.mark.parametrize(
    "options", [{"interval": 0}, {"interval": 1.5}, {"interval_exp_name": -1}, {"out_dir": "s3://a"}]
)
def test_wrong_arguments(options):
    with pytest.raises(ConfigError, match=f"LoggerHook: {next(iter(options))} is"):
        LoggerHook(**options)


def test_epoch_of():
    progress = Progress()
    found = []
    for end in (False, False, True, False):
        found.append(epoch_of(progress))
        progress.advance(1, epoch_end=end)
    assert [*found, epoch_of(progress)] == [0, 1, 1, 1, 2]


def test_learning_rates_of_groups():
    fast, slow = {"lr": torch.tensor(0.5), "initial_lr": 1.0}, {"lr": 0.05, "initial_lr": 0.1}
    optim = SimpleNamespace(param_groups=[fast, {**fast, "lr": 0.5}, slow, dict(slow)])
    assert learning_rates(optim) == {"lr": 0.5, "lr/group_0": 0.5, "lr/group_2": 0.05}
    optim.param_groups = optim.param_groups[:2]
    assert learning_rates(optim) == {"lr": 0.5}
    assert learning_rates(None) == {}
    several = SimpleNamespace(param_groups={"gen": [fast], "disc": [slow]})
    assert learning_rates(several) == {"gen.lr": 0.5, "disc.lr": 0.05}


def test_memory_is_in_mebibytes():
    assert 50 < memory_megabytes(torch.device("cpu")) < 100_000


def test_nothing_is_read_between_two_lines(make_runner, monkeypatch):
    runner = make_runner(per_epoch=50)
    hook = start(LoggerHook(interval=10), runner)
    reads = []
    original = ScalarReader.read
    monkeypatch.setattr(ScalarReader, "read", lambda self: reads.append(runner.progress.iteration) or original(self))
    train(hook, runner, 25)
    assert reads == [10, 20]
