import json
import math
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine import hooks as theirs
from torch import nn

import mmtrain.hooks as ours
from mmtrain.errors import ConfigError
from mmtrain.hooks import EmptyCacheHook, Hook, ProfilerHook, ProgressBarHook, SyncBuffersHook, TextSampleHook
from mmtrain.hooks.text_sample import evaluating
from mmtrain.logging import LiveLine, ProgressBar
from mmtrain.registry import HOOKS

SAME_NAME = [name for name in ours.__all__ if name != "Hook" and hasattr(theirs, name)]


# ---- the contract ---------------------------------------------------------------------------------------------------
def test_every_hook_derives_from_ours_and_ours_from_mmengines():
    assert issubclass(Hook, theirs.Hook)
    for name in ours.__all__:
        assert issubclass(getattr(ours, name), Hook)


@pytest.mark.parametrize("name", SAME_NAME)
def test_priorities_are_mmengines(name):
    assert getattr(ours, name).priority == getattr(theirs, name).priority


@pytest.mark.parametrize("name", [name for name in ours.__all__ if name != "Hook"])
def test_every_hook_is_registered(name):
    assert HOOKS.get(name) is getattr(ours, name)


def test_no_hook_has_a_point_that_does_not_exist():
    points = {*Hook.stages}
    assert {"after_save_checkpoint", "on_exception"} < points
    for name in ours.__all__:
        for attribute in dir(getattr(ours, name)):
            if attribute.startswith(("before_", "after_")):
                assert attribute in points


def test_named_hooks_do_nothing():
    for name in ("ParamSchedulerHook", "IterTimerHook", "RuntimeInfoHook", "DistSamplerSeedHook"):
        assert getattr(ours, name)().get_triggered_stages() == []


def test_only_the_base_imports_mmengines_hooks():
    folder = Path(ours.__file__).parent
    users = [path.name for path in folder.glob("*.py") if "mmengine.hooks" in path.read_text().replace("``", "")]
    assert users == ["base.py"]


# ---- progress bar ---------------------------------------------------------------------------------------------------
def test_the_bar_costs_nothing_where_there_is_no_terminal(make_runner, capsys):
    runner = make_runner()
    hook = ProgressBarHook()
    hook.before_train(runner)
    assert hook._bar.due == math.inf
    runner.step(hook)
    hook.after_val_iter(runner, batch_idx=0)
    hook.after_train(runner)
    hook.on_exception(runner, error=RuntimeError())
    assert capsys.readouterr() == ("", "")


def test_the_bar_shows_the_last_logged_values_and_reads_nothing(make_runner, monkeypatch, tmp_path):
    shown = []
    line = LiveLine()
    monkeypatch.setattr(LiveLine, "available", True)
    monkeypatch.setattr(line, "show", shown.append)
    runner = make_runner(per_epoch=10, max_epochs=10)
    hook = ProgressBarHook()
    hook._bar = ProgressBar(line)
    hook.before_train(runner)
    runner.step(hook)
    assert "loss - lr 1.0e-01" in shown[-1]
    runner.scalars.record_all({"loss": torch.tensor(2.5), "time": 0.2, "data_time": 0.05})
    runner.scalars.read()
    runner.scalars.record("loss", torch.tensor(9.0))
    monkeypatch.setattr(torch.Tensor, "item", None)
    monkeypatch.setattr(torch.Tensor, "tolist", None)
    runner.optim_wrapper.param_groups[0]["lr"] = torch.tensor(0.5)
    hook._bar.due = -math.inf
    runner.step(hook)
    assert "2/100 loss 2.5 lr - " in shown[-1]
    assert "data 25%" in shown[-1]
    hook._bar.due = -math.inf
    hook.after_val_iter(runner, batch_idx=4)
    assert shown[-1].endswith(" val 5")


def test_other_ranks_show_no_bar(make_runner, monkeypatch):
    monkeypatch.setattr(LiveLine, "available", True)
    runner = make_runner()
    runner.rank = 1
    hook = ProgressBarHook()
    hook.before_train(runner)
    assert not hook._bar.live


# ---- text samples ---------------------------------------------------------------------------------------------------
class Writer(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = nn.Dropout()
        self.calls = []

    def generate(self, prompt, *, max_new_tokens, temperature, top_k, generator):
        assert not self.training
        assert not torch.is_grad_enabled()
        torch.rand(3)  # a careless model
        number = torch.randint(1000, (1,), generator=generator).item()
        self.calls.append((prompt, max_new_tokens, temperature, top_k, number))
        return f"{prompt}-{number}"


def test_samples_come_at_intervals_and_at_the_end(make_runner):
    model = Writer()
    runner = make_runner(model=model, per_epoch=10)
    hook = TextSampleHook(["a", "b"], interval=4, max_new_tokens=5, temperature=0.5, top_k=3, seed=1)
    hook.before_train(runner)
    model.train()
    model.part.eval()  # frozen by the user
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    for _ in range(10):
        runner.step(hook)
    hook.after_train(runner)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())
    assert (model.training, model.part.training) == (True, False)
    assert [text.split(":")[0] for text in runner.recorder.infos] == [
        f"Sample at iteration {n}" for n in (4, 4, 8, 8, 10, 10)
    ]
    assert model.calls[0][:4] == ("a", 5, 0.5, 3)
    assert model.calls[0] == model.calls[2] == model.calls[4]  # the same draws every time
    assert model.calls[0][4] != model.calls[1][4]


def test_the_last_sample_is_not_taken_twice(make_runner):
    runner = make_runner(model=Writer())
    hook = TextSampleHook("x", interval=5)
    for _ in range(5):
        runner.step(hook)
    hook.after_train(runner)
    assert len(runner.recorder.infos) == 1


def test_other_ranks_generate_and_say_nothing(make_runner):
    runner = make_runner(model=Writer())
    runner.rank = 1
    hook = TextSampleHook(interval=0)
    runner.step(hook)
    hook.after_train(runner)
    assert len(runner.model.calls) == 1
    assert runner.recorder.infos == []


def test_a_model_that_cannot_write(make_runner):
    with pytest.raises(ConfigError, match=r"the model Linear has no method generate\("):
        TextSampleHook().before_train(make_runner())
    with pytest.raises(ConfigError, match="interval is -1"):
        TextSampleHook(interval=-1)


def test_modes_come_back_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Linear(1, 1)).train()
    model[0].eval()
    with pytest.raises(ValueError, match="inside"), evaluating(model):
        assert not model[1].training
        raise ValueError("inside")
    assert [module.training for module in model.modules()] == [True, False, True]


# ---- memory and buffers ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"before_epoch": True, "after_epoch": False, "after_iter": True}])
def test_the_cache_is_emptied_where_it_was_asked_for(make_runner, monkeypatch, options):
    emptied = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(point))
    runner, hook = make_runner(), EmptyCacheHook(**options)
    for point in ("before_train_epoch", "before_val_epoch", "after_train_epoch", "after_val_epoch"):
        getattr(hook, point)(runner)
    for point in ("before_train_iter", "after_train_iter", "after_val_iter"):
        getattr(hook, point)(runner, batch_idx=0)
    assert emptied == (
        ["before_train_epoch", "before_val_epoch", "after_train_iter", "after_val_iter"]
        if options
        else ["after_train_epoch", "after_val_epoch"]
    )


def test_buffers_are_synchronised_once_per_position(make_runner, monkeypatch):
    calls = []
    monkeypatch.setattr("mmtrain.dist.world_size", lambda: 2)
    monkeypatch.setattr("mmtrain.hooks.memory.average_buffers", calls.append)
    runner, hook = make_runner(), SyncBuffersHook()
    for _ in range(5):
        runner.step(hook)  # the fifth ends an epoch
    hook.before_val_epoch(runner)
    assert len(calls) == 1
    runner.step(hook)
    hook.before_val_epoch(runner)
    assert len(calls) == 2


def test_one_process_leaves_its_buffers_alone(make_runner):
    model = nn.BatchNorm1d(3)
    hook = SyncBuffersHook()
    hook.after_train_epoch(make_runner(model=model))
    assert hook._synced_at == -1


# ---- profiler -------------------------------------------------------------------------------------------------------
def profile(runner, hook, iterations):
    hook.before_train(runner)
    for _ in range(iterations):
        torch.ones(4, 4) @ torch.ones(4, 4)
        runner.step(hook)
    hook.after_train(runner)


def test_the_first_iterations_are_profiled(make_runner):
    runner = make_runner()
    runner.progress.iteration = 1000  # a resumed run has first iterations too
    Path(runner.log_dir).mkdir(parents=True)
    hook = ProfilerHook(
        by_epoch=False, profile_times=2, json_trace_path="trace.json",
        on_trace_ready={"type": "log_trace", "sort_by": "self_cpu_time_total", "row_limit": 5},
    )  # fmt: skip
    profile(runner, hook, 4)
    trace = json.loads((Path(runner.log_dir) / "trace.json").read_text())
    names = [event.get("name") for event in trace["traceEvents"]]
    assert names.count("aten::matmul") == 2
    assert any("aten::mm" in text for text in runner.recorder.infos)


def test_an_epoch_is_profiled_for_tensorboard(make_runner):
    runner = make_runner(per_epoch=3)
    hook = ProfilerHook(
        on_trace_ready={"type": "tb_trace"}, schedule={"wait": 0, "warmup": 1, "active": 1, "repeat": 1}
    )
    profile(runner, hook, 4)
    assert os.listdir(Path(runner.log_dir) / "tf_tracing_logs")


def test_an_error_ends_the_recording(make_runner):
    runner = make_runner()
    hook = ProfilerHook(by_epoch=False, profile_times=5, on_trace_ready=lambda profiler: pytest.fail("written"))
    hook.before_train(runner)
    runner.step(hook)
    hook.on_exception(runner, error=RuntimeError())
    hook.after_train(runner)
    torch.profiler.profile().__enter__().__exit__(None, None, None)  # another one may record now


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"profile_times": 0}, "profile_times is 0"),
        ({"profile_times": 2}, "one epoch is a lot"),
        ({"activity_with_cpu": False}, "both off"),
        ({"on_trace_ready": {"type": "csv"}}, "on_trace_ready is"),
        ({"on_trace_ready": 3}, "on_trace_ready is 3"),
    ],
)
def test_wrong_arguments_of_the_profiler(options, text):
    with pytest.raises(ConfigError, match=text):
        ProfilerHook(**options)
