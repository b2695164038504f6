"""Two LoggerHooks in one real run: each logs the means of its own interval, also over a resume."""

import json
import math

import pytest
from parts import make_runner


class Losses:
    """Collects the loss and the gradient norm of every iteration, and stops the run once at ``stop_at``."""

    priority = "HIGH"

    def __init__(self, stop_at=None):
        self.stop_at, self.losses, self.measured = stop_at, [], []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append(outputs["loss"].item())
        if runner.update_result.grad_norm is not None:
            self.measured.append(runner.progress.iteration)
        if runner.progress.iteration == self.stop_at:
            runner.request_stop("test")


def run(work_dir, losses, **changes):
    hooks = [losses, {"type": "LoggerHook", "interval": 5}]
    make_runner(
        work_dir, default_hooks={"logger": {"type": "LoggerHook", "interval": 3}}, custom_hooks=hooks, **changes
    ).train()


def lines(work_dir):
    found = []
    for path in sorted(work_dir.glob("*/vis_data/scalars.json")):
        records = map(json.loads, path.read_text().splitlines())
        found += [(record["step"], record["loss"]) for record in records if record["mode"] == "train"]
    return found


def test_each_hook_logs_the_means_of_its_own_interval_over_a_resume(tmp_path):
    losses = Losses()
    run(tmp_path / "uninterrupted", losses)
    expected = sorted(
        (end, math.fsum(losses.losses[start:end]) / (end - start))
        for interval in (3, 5)
        for start, end in ((start, min(start + interval, 20)) for start in range(0, 20, interval))
    )
    assert sorted(lines(tmp_path / "uninterrupted")) == expected
    run(tmp_path / "cut", Losses(stop_at=13))
    run(tmp_path / "cut", Losses(), resume=True)
    assert lines(tmp_path / "cut") == lines(tmp_path / "uninterrupted")


def test_gradient_norms_are_measured_for_the_lines_of_both(tmp_path):
    losses = Losses()
    run(tmp_path, losses)
    assert {3, 5, 6, 9, 10, 12, 15, 18, 20} <= {*losses.measured}


@pytest.mark.parametrize("interval", [3, 7])
def test_one_hook_measures_gradient_norms_only_at_its_interval(tmp_path, interval):
    losses = Losses()
    make_runner(
        tmp_path, default_hooks={"logger": {"type": "LoggerHook", "interval": interval}}, custom_hooks=[losses]
    ).train()
    assert losses.measured == list(range(interval, 21, interval))
