"""The progress bar of a run on a terminal."""

from collections.abc import Mapping
from time import perf_counter
from typing import Any

from mmtrain.hooks.base import Hook
from mmtrain.logging import ProgressBar, Shown
from mmtrain.registry import HOOKS
from mmtrain.runner.interface import Runner


@HOOKS.register_module()
class ProgressBarHook(Hook):
    """Shows iteration, percent, loss, lr, samples/s, the share of time spent waiting for data, and the time left.

    Only on a terminal and on rank 0; elsewhere the log lines say the same. It is drawn at most ten times a second, from
    numbers on the host: loss and data share are those of the last log line.
    """

    priority = "LOWEST"

    def __init__(self) -> None:
        self.bar = ProgressBar()

    def before_train(self, runner: Runner) -> None:
        if runner.rank == 0:
            self.bar.start(runner.progress.iteration, runner.progress.samples)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if perf_counter() >= self.bar.due:
            self._draw(runner)

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if perf_counter() >= self.bar.due:
            self.bar.note(f"val {batch_idx + 1}")

    def after_train(self, runner: Runner) -> None:
        if self.bar.live:  # the last drawing shows the end
            self._draw(runner)
        self.bar.finish()

    def on_exception(self, runner: Runner, error: BaseException) -> None:
        self.bar.abandon()

    def _draw(self, runner: Runner) -> None:
        progress, scalars = runner.progress, runner.scalars
        time, data_time = scalars.latest("time"), scalars.latest("data_time")
        groups = runner.optim_wrapper.param_groups if runner.optim_wrapper is not None else []
        groups = next(iter(groups.values())) if isinstance(groups, Mapping) else groups
        lr = groups[0]["lr"] if groups else None
        shown = Shown(
            done=progress.iteration,
            total=runner.max_iters,
            loss=scalars.latest("loss"),
            # A tensor may be on the device; reading it would make the loop wait.
            lr=lr if isinstance(lr, float) else None,
            wait=data_time / time if time and data_time is not None else None,
        )
        self.bar.update(shown, progress.samples)
