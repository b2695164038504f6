import json
from pathlib import Path

import pytest
import torch

from mmtrain.errors import ConfigError
from mmtrain.hooks import ProfilerHook


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
    assert list((Path(runner.log_dir) / "tf_tracing_logs").iterdir())


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
