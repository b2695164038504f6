"""The runner: it holds the parts of a run, and lets hooks ask for a save or a stop. It builds nothing itself."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmtrain import dist, launch
from mmtrain.data.ledger import Ledger
from mmtrain.errors import CheckpointError, ConfigError
from mmtrain.optim import OptimWrapperDict
from mmtrain.progress import Progress
from mmtrain.registry import RUNNERS
from mmtrain.runner.agreement import Agreement
from mmtrain.runner.announce import closing_lines, opening_lines
from mmtrain.runner.compare import Scale, data_fingerprint
from mmtrain.runner.evaluation import EvaluationLoop
from mmtrain.runner.hook_points import HookList
from mmtrain.runner.loops import TrainLoop, TrainPlan
from mmtrain.runner.run_directory import watch_seconds
from mmtrain.runner.saving import SaveRequest, SaveService
from mmtrain.runner.signals import Signals
from mmtrain.strategies import Strategy
from mmtrain.types import StepResult


@dataclass(frozen=True, slots=True)
class Randomness:
    """Where random numbers come from: ``randomness`` of the config, with the seed that is really used.

    ``positional`` seeds every step, sample and validation from where the run stands; switched off, the generators run
    on from the seed and their saved states rule at a resume.
    """

    seed: int
    deterministic: bool = False
    diff_rank_seed: bool = True
    per_sample: bool = True
    positional: bool = True


@dataclass
class Parts:
    """Everything a runner holds: objects, never configs (``cfg`` is kept for the record)."""

    cfg: Any
    work_dir: Path
    log_dir: Path
    timestamp: str
    experiment_name: str
    logger: logging.Logger
    randomness: Randomness
    strategy: Strategy
    hooks: HookList
    scalars: Any
    writers: list[Any]
    saving: SaveService
    train_dataloader: Any = None
    train_plan: TrainPlan | None = None
    train_loop_class: type[TrainLoop] = TrainLoop
    ledger: Ledger | None = None
    schedules: Any = None
    val_sets: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    test_sets: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    config_text: str = ""
    eval_fp16: Mapping[str, bool] = field(default_factory=dict)
    visualizer: Any = None
    resume: Any = None
    locks: ExitStack = field(default_factory=ExitStack)
    notices: list[str] = field(default_factory=list)


@RUNNERS.register_module()
class FlexibleRunner:
    """Runs training, validation and test of one set of parts.

    ``FlexibleRunner.from_cfg(cfg)`` builds the parts of a config; ``train()``, ``val()`` and ``test()`` run them.
    ``iter`` and ``epoch`` are the 0-based index of the iteration and epoch in progress, as in MMEngine; ``progress`` is
    the position. Hooks act on a run in two ways only, `request_save` and `request_stop`, read at the end of a step.
    """

    def __init__(self, parts: Parts) -> None:
        self.cfg = parts.cfg
        self.work_dir, self.log_dir = str(parts.work_dir), str(parts.log_dir)
        self.timestamp, self.experiment_name = parts.timestamp, parts.experiment_name
        self.logger, self.randomness, self.seed = parts.logger, parts.randomness, parts.randomness.seed
        self.strategy, self.hooks, self.scalars = parts.strategy, parts.hooks, parts.scalars
        self.writers, self.visualizer, self.schedules = parts.writers, parts.visualizer, parts.schedules
        self.saving, self.notices = parts.saving, parts.notices
        self.model: nn.Module = parts.strategy.model
        self.optim_wrapper: Any = parts.strategy.optim
        self.device: torch.device = parts.strategy.device
        self.train_dataloader, self.ledger = parts.train_dataloader, parts.ledger
        self.config_text = parts.config_text
        self._eval_fp16 = parts.eval_fp16
        self._resume, self._locks = parts.resume, parts.locks
        self.data_fingerprint = data_fingerprint(parts.train_dataloader.dataset) if parts.train_dataloader else ""

        self.progress = Progress()
        self.iter = self.epoch = 0
        self.update_result: StepResult | None = None
        self.metrics: dict[str, float] = {}
        self.stop_requested: str | None = None
        self.stops_for_good = False
        self.signals = Signals()
        self.agreement = Agreement() if dist.world_size() > 1 else None

        self.val_loop = EvaluationLoop(self, "val", parts.val_sets) if parts.val_sets else None
        self.test_loop = EvaluationLoop(self, "test", parts.test_sets) if parts.test_sets else None
        self.train_loop: TrainLoop | None = None
        if parts.train_plan is not None and self.optim_wrapper is not None:
            self.train_loop = parts.train_loop_class(
                self, parts.train_plan, accumulative_counts=self.optim_wrapper.accumulative_counts
            )

    @classmethod
    def from_cfg(cls, cfg: Any, *, task: str = "train") -> FlexibleRunner:
        """Build a runner from a config.

        ``task`` is "train", "val" or "test": the last two leave out what only training needs. Raises ConfigError for
        anything in the config that cannot be right, before anything is run.
        """
        from mmtrain.runner.build import assemble

        return cls(assemble(cfg, task=task))

    # ---- what hooks and loops read ------------------------------------------------------------------------------
    @property
    def exit_status(self) -> int:
        """The status for the process to exit with: 75 or 130 after a signal, else 0."""
        return self.signals.exit_status

    @property
    def resumed_from(self) -> str | None:
        """The name of the checkpoint that this run continues, None for one that began anew."""
        checkpoint = self._resume.checkpoint
        return checkpoint.name if checkpoint is not None else None

    @property
    def data_moved_by(self) -> Any:
        """``resume_data``, where it has moved this run to other data or another place of them; else None."""
        return self._resume.moved_by

    @property
    def rank(self) -> int:
        return dist.rank()

    @property
    def world_size(self) -> int:
        return dist.world_size()

    @property
    def distributed(self) -> bool:
        return dist.is_distributed()

    @property
    def iterations_per_epoch(self) -> int | None:
        """Iterations of one pass over the training data, or None where that is unknown."""
        return getattr(self.train_dataloader, "iterations_per_epoch", None)

    @property
    def iterations_left_in_epoch(self) -> int | None:
        """Iterations from the position to the end of its pass, or None where that is unknown."""
        return self.train_dataloader.iterations_left(self.progress.epoch, self.progress.offset)

    @property
    def optimizer_name(self) -> str:
        """The class name of the optimizer (of several ``gen Adam, disc SGD``), "" without one."""
        optimizers = self.optim_wrapper.optimizers if self.optim_wrapper is not None else {}
        return ", ".join(f"{name} {type(one).__name__}".lstrip() for name, one in optimizers.items())

    @property
    def scale(self) -> Scale:
        """How this run counts samples, iterations and updates."""
        batch = self.train_dataloader.batch_size
        return Scale(
            global_batch=batch * dist.data_size() if batch else None,
            accumulative_counts=self.optim_wrapper.accumulative_counts,
            iterations_per_epoch=self.iterations_per_epoch,
        )

    @property
    def max_epochs(self) -> int | None:
        return self.train_loop.plan.max_epochs if self.train_loop else None

    @property
    def max_iters(self) -> int | None:
        """Iterations of the whole run, from its beginning to its end at today's batch size."""
        if self.train_loop is None:
            return None
        plan = self.train_loop.plan
        if plan.max_iters is not None:
            return plan.max_iters
        per_epoch, left = self.iterations_per_epoch, self.iterations_left_in_epoch
        if per_epoch is None or left is None or plan.max_epochs is None:
            return None
        progress = self.progress
        if progress.epoch >= plan.max_epochs:
            return progress.iteration
        return progress.iteration + left + (plan.max_epochs - progress.epoch - 1) * per_epoch

    @property
    def val_dataloader(self) -> Any:
        return self.val_loop.dataloader if self.val_loop else None

    @property
    def test_dataloader(self) -> Any:
        return self.test_loop.dataloader if self.test_loop else None

    def evaluation_context(self, kind: str) -> AbstractContextManager[Any]:
        """The precision of evaluation: that of training, or float16 where ``val_cfg.fp16`` says so.

        Where several optimizers may train in several precisions, it is the weights' own, as in MMEngine.
        """
        if self._eval_fp16.get(kind):
            return torch.autocast(self.device.type, dtype=torch.float16)
        one = self.optim_wrapper is not None and not isinstance(self.optim_wrapper, OptimWrapperDict)
        return self.strategy.forward_context() if one else nullcontext()

    # ---- the two ways up ----------------------------------------------------------------------------------------
    def request_save(self, reason: str, **options: Any) -> None:
        """Ask for a checkpoint at the end of this step, or of its window. Options are those of `SaveRequest`.

        With several ranks all must ask alike, except for the reason "time": one rank's clock asks for all.
        """
        if self.agreement is not None and reason == "time":
            self.agreement.wants_save = True
            return
        self.saving.requests.append(SaveRequest(reason=reason, **options))

    def request_stop(self, reason: str, *, for_good: bool = False) -> None:
        """Ask the run to end after this step's window; ``for_good``: the same command would end there again."""
        if self.stop_requested is None:
            self.stop_requested, self.stops_for_good = reason, for_good
            self.logger.info("Stopping at the end of this step: %s", reason)

    def leave_on_signal(self) -> None:
        """Save and stop at the next save point, because a signal asked for it."""
        if self.stop_requested is None:
            self.request_save("signal", blocking=True)
            self.request_stop(f"{self.signals.name} received; saving before leaving")

    # ---- what the loop asks -------------------------------------------------------------------------------------
    def set_schedule(self) -> None:
        """Set lr, momentum and whatever else is scheduled for the update that follows the position."""
        if self.schedules is not None:
            self.schedules.apply(self.progress.scheduled, self.progress.epoch)

    # ---- running ------------------------------------------------------------------------------------------------
    def train(self) -> nn.Module:
        """Train from the beginning, or from the checkpoint that the config asks to resume; returns the model.

        Raises RunError where the last checkpoint could not be written, although the training itself is complete.
        """
        if self.train_loop is None:
            raise ConfigError("train() needs train_dataloader, train_cfg and optim_wrapper in the config")
        begun = time.perf_counter()
        with _Running(self):
            self._say(opening_lines(self))
            self.hooks.call("before_run", self)
            self._resume.prepare(self)
            self._resume.announce(self)
            self.train_loop.run()
            self.hooks.call("after_run", self)
            self._say(closing_lines(self, seconds=time.perf_counter() - begun))
            self.saving.check_complete()
        return self.model

    def _say(self, lines: list[str]) -> None:
        for line in lines:
            self.logger.info("%s", line)

    def val(self) -> dict[str, float]:
        """Run the validation sets once and return their metrics."""
        return self._evaluate(self.val_loop, "val")

    def test(self) -> dict[str, float]:
        """Run the test sets once and return their metrics."""
        return self._evaluate(self.test_loop, "test")

    def release(self) -> None:
        """Give back the work dir's lock and whatever the strategy entered."""
        self._locks.close()
        self.strategy.teardown()

    def _evaluate(self, loop: EvaluationLoop | None, kind: str) -> dict[str, float]:
        if loop is None:
            raise ConfigError(f"{kind}() needs {kind}_dataloader in the config")
        with _Running(self):
            self.hooks.call("before_run", self)
            self._resume.load_weights(self)
            metrics = loop.run()
            self.hooks.call("after_run", self)
        return metrics


class _Running:
    """Tells hooks of an exception and puts away what the run holds, whatever happened."""

    def __init__(self, runner: FlexibleRunner) -> None:
        self._runner = runner

    def __enter__(self) -> None:
        runner = self._runner
        launch.watch(watch_seconds(runner.cfg), lambda: runner.progress.iteration)
        runner.signals.__enter__()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self._put_away(error)
        finally:
            launch.end_watch()

    def _put_away(self, error: BaseException | None) -> None:
        runner = self._runner
        if error is not None:
            _tell(runner, error)
        with ExitStack() as closing:  # from the last line up; whatever fails, the rest is put away
            closing.callback(runner.signals.__exit__)
            closing.callback(runner.release)
            for writer in runner.writers:
                closing.callback(writer.close)
            closing.callback(_close_saving, runner, error)
            for part in (runner.test_loop, runner.val_loop, runner.train_dataloader):
                if part is not None:
                    closing.callback(part.close)


def _close_saving(runner: FlexibleRunner, error: BaseException | None) -> None:
    """Wait for a save in the background. That it failed must not hide ``error``, by which the run ends."""
    try:
        runner.saving.close()
    except CheckpointError as failure:
        if error is None:
            raise
        runner.logger.error("%s", failure)


def _tell(runner: FlexibleRunner, error: BaseException) -> None:
    for hook in runner.hooks.points["on_exception"]:
        try:
            hook(runner, error=error)
        except Exception:  # the first error is the one to tell
            runner.logger.exception("on_exception of a hook failed")
