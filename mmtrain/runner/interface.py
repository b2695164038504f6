"""What a hook may use of the runner, as a type: annotate ``runner: Runner`` and an editor completes its names."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from mmtrain.data import Stream
from mmtrain.logging import Scalars, ScalarWriter
from mmtrain.optim import OptimWrapper, ScheduleSet
from mmtrain.progress import Progress
from mmtrain.runner.hook_points import HookList
from mmtrain.strategies import Strategy
from mmtrain.types import Batch, MicroBatch, StepResult


class TrainLoopView(Protocol):
    """What a hook may use of the train loop.

    ``batch`` and ``micro_batch`` are those of the iteration in progress; ``batch`` is None between iterations.
    """

    batch: Batch | None
    micro_batch: MicroBatch

    @property
    def by_epoch(self) -> bool:
        """Whether the run's length is counted in epochs."""

    @property
    def finished(self) -> bool:
        """Whether the position has reached the end of the run."""

    @property
    def dataloader(self) -> Any:
        """The training data stream."""


class EvaluationLoopView(Protocol):
    """What a hook may use of the validation and test loops."""

    @property
    def dataloader(self) -> Any:
        """The loader of the first set."""

    @property
    def evaluator(self) -> Any:
        """The evaluator of the first set, or None."""

    def metric_names(self) -> list[str]:
        """The names that validation reports, from one batch of every set; changes nothing."""

    def run(self) -> dict[str, float]:
        """Evaluate all sets and call the hooks; returns the metrics."""


class CheckpointerView(Protocol):
    """What a hook may use of the owner of the checkpoints."""

    failure: str | None  # the sentence about the last save that failed, until a later one succeeds

    def newest(self) -> Path | None:
        """The path of the newest checkpoint."""


class Runner(Protocol):
    """The runner as hooks see it. Names and meanings are MMEngine's where MMEngine has them.

    ``iter`` and ``epoch`` are the 0-based index of the iteration and epoch in progress at every point; ``progress`` is
    the position. ``max_iters``, ``max_epochs`` and ``iterations_per_epoch`` are None if they are unknown.
    ``update_result`` is the result of the update that this iteration ended, None inside an accumulation window.
    ``metrics`` are those of the last validation or test. ``data_moved_by`` is ``resume_data`` if a resume moved the
    data position deliberately.
    """

    # ---- the run
    cfg: Any
    work_dir: str
    log_dir: str
    timestamp: str
    experiment_name: str
    logger: logging.Logger
    seed: int

    # ---- the parts
    model: nn.Module
    device: torch.device
    strategy: Strategy
    optim_wrapper: OptimWrapper | None
    train_dataloader: Stream | None
    schedules: ScheduleSet | None
    hooks: HookList
    scalars: Scalars
    writers: list[ScalarWriter]
    visualizer: Any

    # ---- where the run is
    progress: Progress
    iter: int
    epoch: int
    update_result: StepResult | None
    metrics: dict[str, float]
    resumed_from: str | None
    data_moved_by: Any

    @property
    def train_loop(self) -> TrainLoopView | None: ...

    @property
    def val_loop(self) -> EvaluationLoopView | None: ...

    @property
    def test_loop(self) -> EvaluationLoopView | None: ...

    @property
    def checkpointer(self) -> CheckpointerView: ...

    @property
    def val_dataloader(self) -> Any: ...

    @property
    def test_dataloader(self) -> Any: ...

    @property
    def max_epochs(self) -> int | None: ...

    @property
    def max_iters(self) -> int | None: ...

    @property
    def iterations_per_epoch(self) -> int | None: ...

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def distributed(self) -> bool: ...

    # ---- the two ways to act on the run, both read at the end of a step
    def request_save(self, reason: str, **options: Any) -> None:
        """Ask for a checkpoint; options are those of `mmtrain.runner.requests.SaveRequest`."""

    def request_stop(self, reason: str, *, for_good: bool = False) -> None:
        """Ask the run to end; ``for_good``: the same command would end there again."""
