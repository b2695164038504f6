"""Protocols and small value types that the layers above share."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

StateDict = dict[str, Any]


@runtime_checkable
class Stateful(Protocol):
    """Whatever must survive a restart.

    ``state_dict`` returns plain Python values (None, bool, int, float, str, bytes, list, tuple, dict) and tensors,
    nested as it likes; it is called at a save point, so it never holds a half-finished step.
    """

    def state_dict(self) -> StateDict: ...

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> Any: ...


@dataclass(frozen=True, slots=True)
class SampleIndices:
    """The samples that a reader read for a batch on this rank.

    ``values`` are their indices in the dataset as int64 in native byte order. ``start`` is the position of the first in
    the order of epoch ``epoch``; the others follow it.
    """

    epoch: int
    start: int
    values: bytes


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch of the training stream, and how far it moves the position.

    ``data`` is what ``collate_fn`` returned, on the CPU. ``samples`` is the number of samples that all ranks together
    consume in this iteration. ``epoch_end`` is True for the last batch of an epoch. ``weight`` is this rank's share of
    the samples times the number of ranks: 1 if all have the same number. The mean over ranks of each rank's mean loss
    times its weight is the mean over the global batch. A weight of 0 marks a stand-in: a rank without a sample
    processes one of another rank, because the collectives of the others need it. ``indices`` are present after
    `data.Stream.report_indices`.
    """

    data: Any
    samples: int
    epoch_end: bool
    weight: float = 1.0
    indices: SampleIndices | None = None


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Where one iteration is in its window of accumulated gradients, which ends with one optimizer step.

    ``index`` counts from 0. ``length`` is the number of micro-batches in this window, by which each loss is divided;
    the last window of a run or an epoch may be shorter than ``accumulative_counts``. Ranks exchange gradients in the
    backward of the micro-batch that ``is_last``.
    """

    index: int
    length: int
    is_last: bool


@cache
def accumulation_window(length: int) -> tuple[MicroBatch, ...]:
    """The micro-batches of a window of ``length``; the same objects in every call."""
    return tuple(MicroBatch(index, length, index == length - 1) for index in range(length))


@dataclass(frozen=True, slots=True)
class StepResult:
    """The outcome of one optimizer step.

    ``grad_norm`` is the total norm of the gradients before clipping, a 0-d tensor left on its device, or None where
    nothing measured it. ``applied`` is False when a loss scaler skipped the step because a gradient was not finite.
    """

    grad_norm: Tensor | None
    applied: bool = True
