"""What the loops, saving and resuming read of a run: its parts, its position and its counters. It runs nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from mmtrain import dist
from mmtrain.data import Stream
from mmtrain.logging import Scalars, ScalarWriter
from mmtrain.model_state import Kind
from mmtrain.optim import GroupValues, OptimWrapper, ScheduleSet
from mmtrain.progress import Progress
from mmtrain.runner.data_identity import data_fingerprint
from mmtrain.runner.frozen import FrozenParameters
from mmtrain.runner.geometry import BatchGeometry
from mmtrain.runner.hook_points import HookList
from mmtrain.runner.requests import StepRequests
from mmtrain.runner.run_directory import RunDirectory
from mmtrain.runner.switches import ModelSwitches
from mmtrain.runner.train_schedule import TrainSchedule
from mmtrain.strategies import Strategy
from mmtrain.types import StepResult


@dataclass(frozen=True, slots=True)
class Randomness:
    """Where random numbers come from: ``randomness`` of the config, with the seed that is really used.

    ``positional`` seeds every step, sample and validation from the run's position; switched off, the generators
    continue from the seed and a resume restores their saved states.
    """

    seed: int
    deterministic: bool = False
    diff_rank_seed: bool = True
    per_sample: bool = True
    positional: bool = True


class EvaluationSet(NamedTuple):
    """One validation or test set: its loader, and its evaluator or None (then only the loss is measured)."""

    loader: Any
    evaluator: Any


@dataclass(kw_only=True, eq=False)
class Run:
    """The parts of a run (objects, never configs; ``cfg`` is kept for the record), its position and its counters.

    ``iter`` and ``epoch`` are the 0-based index of the iteration and epoch in progress at every hook point, as in
    MMEngine; ``progress`` is the position. ``update_result`` is the result of the update that this iteration ended, or
    None inside an accumulation window. ``metrics`` are those of the last validation or test.
    """

    # ---- the parts
    cfg: Any
    directory: RunDirectory
    randomness: Randomness
    strategy: Strategy
    hooks: HookList
    requests: StepRequests
    scalars: Scalars = field(default_factory=Scalars)
    writers: list[ScalarWriter] = field(default_factory=list)
    visualizer: Any = None
    train_dataloader: Stream | None = None
    train_schedule: TrainSchedule | None = None
    schedules: ScheduleSet | None = None
    group_values: GroupValues | None = None
    val_sets: Mapping[str, EvaluationSet] = field(default_factory=dict)
    test_sets: Mapping[str, EvaluationSet] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)  # what to tell the user about the set-up, at the start

    # ---- the position and the counters
    progress: Progress = field(default_factory=Progress)
    iter: int = 0
    epoch: int = 0
    update_result: StepResult | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    resumed_from: str | None = None  # the name of the checkpoint that this run continues
    data_moved_by: Any = None  # ``resume_data``, where a resume moved this run to other data or another place in it
    after_before_train: list[Callable[[], None]] = field(
        default_factory=list
    )  # what a resume does after that hook point

    def __post_init__(self) -> None:
        self.work_dir = str(self.directory.work_dir)
        self.log_dir = str(self.directory.log_dir)
        self.timestamp = self.directory.timestamp
        self.experiment_name = self.directory.experiment_name
        self.logger: logging.Logger = self.directory.logger
        self.seed = self.randomness.seed
        self.model: nn.Module = self.strategy.model
        self.optim_wrapper: OptimWrapper | None = self.strategy.optim
        self.device: torch.device = self.strategy.device
        self.frozen = FrozenParameters()
        self.switches = ModelSwitches(self.model)
        self.buffer_kinds: dict[str, Kind] = {}  # as the model was built; those that change are noted in checkpoints
        stream = self.train_dataloader
        self.data_fingerprint = data_fingerprint(stream.dataset) if stream is not None else ""

    # ---- what is derived from them ------------------------------------------------------------------------------
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
    def stop_requested(self) -> str | None:
        """Why the run will end before its schedule does, or None."""
        return self.requests.stop_reason

    @property
    def iterations_per_epoch(self) -> int | None:
        """Iterations of one epoch, or None if that is unknown."""
        return getattr(self.train_dataloader, "iterations_per_epoch", None)

    @property
    def iterations_left_in_epoch(self) -> int | None:
        """Iterations from the position to the end of its epoch, or None if that is unknown."""
        stream = self.train_dataloader
        return None if stream is None else stream.iterations_left(self.progress.epoch, self.progress.offset)

    @property
    def optimizer_name(self) -> str:
        """The class name of the optimizer (of several ``gen Adam, disc SGD``), "" without one."""
        optimizers = self.optim_wrapper.optimizers if self.optim_wrapper is not None else {}
        return ", ".join(f"{name} {type(one).__name__}".lstrip() for name, one in optimizers.items())

    @property
    def geometry(self) -> BatchGeometry:
        """How this run counts samples, iterations and updates."""
        batch = self.train_dataloader.batch_size if self.train_dataloader is not None else None
        return BatchGeometry(
            global_batch=batch * dist.data_size() if batch else None,
            accumulative_counts=self.optim_wrapper.accumulative_counts if self.optim_wrapper is not None else 1,
            iterations_per_epoch=self.iterations_per_epoch,
        )

    @property
    def max_epochs(self) -> int | None:
        return self.train_schedule.max_epochs if self.train_schedule is not None else None

    @property
    def max_iters(self) -> int | None:
        """Iterations of the whole run, from its beginning to its end at today's batch size."""
        schedule = self.train_schedule
        if schedule is None or schedule.max_iters is not None:
            return schedule.max_iters if schedule is not None else None
        per_epoch = self.iterations_per_epoch
        left = self.iterations_left_in_epoch
        if per_epoch is None or left is None or schedule.max_epochs is None:
            return None
        progress = self.progress
        if progress.epoch >= schedule.max_epochs:
            return progress.iteration
        return progress.iteration + left + (schedule.max_epochs - progress.epoch - 1) * per_epoch

    @property
    def is_complete(self) -> bool:
        """Whether the position has reached the end of the train schedule."""
        schedule = self.train_schedule
        if schedule is None:
            return False
        if schedule.max_epochs is not None:
            return self.progress.epoch >= schedule.max_epochs
        return self.progress.iteration >= (schedule.max_iters or 0)

    def set_schedule(self) -> None:
        """Set lr, momentum and whatever else is scheduled for the update that follows the position."""
        if self.schedules is not None:
            self.schedules.apply(self.progress.scheduled, self.progress.epoch)
