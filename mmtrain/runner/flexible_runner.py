"""The runner: it holds the parts of a run, starts it, and lets hooks ask for a save or a stop."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mmtrain import launch
from mmtrain.errors import CheckpointError, ConfigError
from mmtrain.registry import RUNNERS
from mmtrain.runner.announce import closing_lines, opening_lines
from mmtrain.runner.build import assemble
from mmtrain.runner.checkpointer import Checkpointer
from mmtrain.runner.choose import StartPoint
from mmtrain.runner.evaluation import EvaluationLoop
from mmtrain.runner.loops import TrainLoop
from mmtrain.runner.resume import load_start_weights, restore
from mmtrain.runner.run import Run
from mmtrain.runner.run_directory import watch_seconds


@RUNNERS.register_module()
@dataclass(kw_only=True, eq=False)
class FlexibleRunner(Run):
    """Runs training, validation and test.

    ``FlexibleRunner.from_cfg(cfg)`` builds the parts of a config; ``train()``, ``val()`` and ``test()`` run them. Hooks
    act on a run in two ways only, `request_save` and `request_stop`, which are read at the end of a step. What hooks
    may read is `mmtrain.runner.interface.Runner`.
    """

    start: StartPoint
    checkpointer: Checkpointer
    train_loop_class: type[TrainLoop] = TrainLoop
    locks: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start.checkpoint is not None:
            self.resumed_from = self.start.checkpoint.name
        self.val_loop = self._evaluation_loop("val")
        self.test_loop = self._evaluation_loop("test")
        self.train_loop: TrainLoop | None = None
        if self.train_schedule is not None and self.optim_wrapper is not None:
            self.train_loop = self.train_loop_class(self, self.checkpointer, self.val_loop)

    def _evaluation_loop(self, kind: str) -> EvaluationLoop | None:
        sets = self.val_sets if kind == "val" else self.test_sets
        fp16 = bool((self.cfg.get(f"{kind}_cfg") or {}).get("fp16"))
        return EvaluationLoop(self, kind, sets, fp16=fp16) if sets else None

    @classmethod
    def from_cfg(cls, cfg: Any, *, task: str = "train") -> FlexibleRunner:
        """Build a runner from a config.

        ``task`` is "train", "val" or "test": the last two leave out what only training needs. Raises ConfigError for
        anything invalid in the config, before anything is run.
        """
        return assemble(cfg, cls, task=task)

    # ---- what hooks use -----------------------------------------------------------------------------------------
    @property
    def val_dataloader(self) -> Any:
        return self.val_loop.dataloader if self.val_loop else None

    @property
    def test_dataloader(self) -> Any:
        return self.test_loop.dataloader if self.test_loop else None

    def request_save(self, reason: str, **options: Any) -> None:
        """Ask for a checkpoint at the end of this step, or of its window. Options are those of `SaveRequest`.

        With several ranks, all must ask for the same, except for the reason "time": one rank's clock asks for all.
        """
        self.requests.request_save(reason, **options)

    def request_stop(self, reason: str, *, for_good: bool = False) -> None:
        """Ask the run to end after this step's window; ``for_good``: the same command would end there again."""
        self.requests.request_stop(reason, for_good=for_good)

    # ---- running ------------------------------------------------------------------------------------------------
    @property
    def exit_status(self) -> int:
        """The status for the process to exit with: 75 or 130 after a signal, else 0."""
        return self.requests.signals.exit_status

    def train(self) -> nn.Module:
        """Train from the beginning, or from the checkpoint that the config asks to resume; returns the model.

        Raises RunError if the last checkpoint could not be written, although the training itself is complete.
        """
        if self.train_loop is None:
            raise ConfigError("train() needs train_dataloader, train_cfg and optim_wrapper in the config")
        began = time.perf_counter()
        with _Running(self):
            self._log(opening_lines(self))
            self.hooks.call("before_run", self)
            self._restore()
            self.train_loop.run()
            self.hooks.call("after_run", self)
            if self.is_complete:
                self.checkpointer.publish()
            newest = self.checkpointer.newest()
            self._log(closing_lines(self, seconds=time.perf_counter() - began, newest=newest))
            self.checkpointer.check_complete()
        return self.model

    def _restore(self) -> None:
        """Go to where the run starts, and log what was chosen and restored and what to know about the set-up."""
        name = self.checkpointer.name_run(self.start)
        report = restore(self, self.start, self.checkpointer.store, self.checkpointer.best, name=name)
        self._log([*report.lines, *self.checkpointer.begin(self, self.start), *self.notices])
        for line in report.warnings if self.rank == 0 else ():  # the same on all ranks
            self.logger.warning("%s", line)
        if self.resumed_from is None:
            return
        progress = self.progress
        total = f"/{self.max_iters}" if self.max_iters is not None else ""
        if self.is_complete:
            self.logger.info(
                "Training is already complete (%d%s iterations). To continue, increase max_epochs or max_iters in "
                "train_cfg.",
                progress.iteration,
                total,
            )
        else:
            self.logger.info(
                "Resuming at iteration %d%s (epoch %d, sample %d, update %d).",
                progress.iteration,
                total,
                progress.epoch + 1,
                progress.offset,
                progress.update,
            )

    def _log(self, lines: list[str]) -> None:
        for line in lines:
            self.logger.info("%s", line)

    def val(self) -> dict[str, float]:
        """Run the validation sets once and return their metrics."""
        return self._evaluate(self.val_loop, "val")

    def test(self) -> dict[str, float]:
        """Run the test sets once and return their metrics."""
        return self._evaluate(self.test_loop, "test")

    def _evaluate(self, loop: EvaluationLoop | None, kind: str) -> dict[str, float]:
        if loop is None:
            raise ConfigError(f"{kind}() needs {kind}_dataloader in the config")
        with _Running(self):
            self.hooks.call("before_run", self)
            load_start_weights(self, self.start)
            metrics = loop.run()
            self.hooks.call("after_run", self)
        return metrics

    def release(self) -> None:
        """Release the work dir's lock and whatever the strategy entered."""
        self.locks.close()
        self.strategy.teardown()


class _Running:
    """Tells hooks about an exception and releases what the run holds, whatever happened."""

    def __init__(self, runner: FlexibleRunner) -> None:
        self._runner = runner

    def __enter__(self) -> None:
        runner = self._runner
        launch.watch(watch_seconds(runner.cfg), lambda: runner.progress.iteration)
        runner.requests.signals.__enter__()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            launch.note(error)  # before anything is closed: the other ranks would take that for the cause
        try:
            self._release(error)
        finally:
            launch.end_watch()

    def _release(self, error: BaseException | None) -> None:
        runner = self._runner
        if error is not None:
            _call_on_exception(runner, error)
        with ExitStack() as closing:  # from the last line up; if one fails, the others are still closed
            closing.callback(runner.requests.signals.__exit__)
            closing.callback(runner.release)
            for writer in runner.writers:
                closing.callback(writer.close)
            closing.callback(_close_checkpointer, runner, error)
            for part in (runner.test_loop, runner.val_loop, runner.train_dataloader):
                if part is not None:
                    closing.callback(part.close)


def _close_checkpointer(runner: FlexibleRunner, error: BaseException | None) -> None:
    """Wait for a save in the background. Its failure must not hide ``error``, which ends the run."""
    try:
        runner.checkpointer.close()
    except CheckpointError as failure:
        if error is None:
            raise
        runner.logger.error("%s", failure)


def _call_on_exception(runner: FlexibleRunner, error: BaseException) -> None:
    for hook in runner.hooks.points["on_exception"]:
        try:
            hook(runner, error=error)
        except Exception:  # the first error is the one to report
            runner.logger.exception("on_exception of a hook failed")
