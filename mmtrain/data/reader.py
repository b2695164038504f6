"""Reading a batch: what happens in a data worker, or in the main process when there are none."""

import pickle
import traceback
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from torch.utils.data import Subset

from mmtrain.data.options import Place
from mmtrain.data.sampler import Draw
from mmtrain.errors import RunError
from mmtrain.randomness import STREAM_BATCH, STREAM_SAMPLE, STREAM_VAL, fold, mix, seed_generators

Collate = Callable[[list[Any]], Any]


class Reported(NamedTuple):
    """A batch with the pass and the sample indices (int64) that its reader read; it travels from a worker."""

    data: Any
    epoch: int
    indices: bytes


@dataclass
class SampleError:
    """An error on its way to the main process: the sentence to tell, the exception and, from a worker, its traceback.

    It travels as a result and is no exception itself, because torch re-raises a worker's exception as a new one of
    the same type with the traceback for its message, which not every type can be made from.
    """

    sentence: str
    error: BaseException | None = None
    trace: str = ""

    def raise_it(self) -> NoReturn:
        """Raise the RunError in the main process, chained to the original exception."""
        if self.error is not None and self.trace:
            self.error.__cause__ = RuntimeError(f"in a data worker:\n{self.trace}")
        raise RunError(self.sentence) from self.error

    def packed(self) -> "SampleError":
        """Return a copy that can travel between processes: an exception that cannot becomes a RuntimeError."""
        if self.error is None:
            return self
        trace = "".join(traceback.format_exception(self.error))
        try:
            error = pickle.loads(pickle.dumps(self.error))
        except Exception:
            error = RuntimeError(describe(self.error))
        return SampleError(self.sentence, error if isinstance(error, BaseException) else None, trace)


def describe(error: BaseException) -> str:
    """Return type and message of an exception on one line."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def reads_whole_batches(dataset: Any) -> bool:
    """Tell whether the data set has a ``__getitems__`` of its own, as Hugging Face's have.

    A plain ``torch.utils.data.Subset`` has one that only passes the indices on, so what it wraps decides.
    """
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return callable(getattr(dataset, "__getitems__", None))


class SeededReader:
    """Turns a `Draw` into a batch, with every generator seeded from the position.

    With ``per_sample`` python's, numpy's and torch's generators are seeded before each ``dataset[i]`` by (seed, epoch,
    i); without it once a batch by (seed, epoch, first global sample, rank). A data set with ``__getitems__`` reads a
    whole batch in one call, so it is seeded once a batch in both cases.
    ``validation`` seeds from the validation stream, where every pass counts as the same one.

    Called with a draw it returns what ``collate`` gave, None for a draw without samples, or a `SampleError`; with
    ``reports`` what ``collate`` gave is in a `Reported`.
    """

    def __init__(
        self, dataset: Any, collate: Collate, *, place: Place, refuse_none: bool = False, validation: bool = False
    ) -> None:
        self.dataset = dataset
        self._collate = collate
        self.reports = False
        self._place = place
        self._refuse_none = refuse_none
        self._sample_stream = STREAM_VAL if validation else STREAM_SAMPLE
        self._batch_stream = STREAM_VAL if validation else STREAM_BATCH
        self._whole = reads_whole_batches(dataset)
        self._per_sample = place.per_sample and not self._whole
        self._prefix_of, self._prefix_value = (-1, -1), 0

    def __call__(self, draw: Draw) -> Any:
        if not draw.indices:
            return None
        if not self._per_sample:
            seed_generators(fold(fold(self._prefix(self._batch_stream, draw.epoch), draw.offset), self._place.rank))
        samples = self._read_whole(draw) if self._whole else self._read_each(draw)
        if isinstance(samples, SampleError):
            return samples
        try:
            data = self._collate(samples)
            if not self.reports:
                return data
            return Reported(data, draw.epoch, array("q", draw.indices[: len(samples)]).tobytes())
        except Exception as error:
            name = getattr(self._collate, "__name__", type(self._collate).__name__)
            return SampleError(
                f"{self._place.path}.collate_fn: {name} failed with {describe(error)} on the samples "
                f"{shortened(draw.indices)} of {type(self.dataset).__name__}; name one that fits: 'pad_collate' for "
                "samples of different sizes, 'pseudo_collate' for MMEngine's data elements, or a function of your own",
                error,
            )

    def _prefix(self, stream: int, epoch: int) -> int:
        """``mix(stream, seed, epoch)``, kept for the length of an epoch."""
        if self._prefix_of != (stream, epoch):
            self._prefix_of, self._prefix_value = (stream, epoch), mix(stream, self._place.seed, epoch)
        return self._prefix_value

    def _read_each(self, draw: Draw) -> list[Any] | SampleError:
        dataset, epoch = self.dataset, draw.epoch
        waiting = iter(draw.indices)
        samples: list[Any] = []
        try:
            if self._per_sample:
                prefix = self._prefix(self._sample_stream, epoch)
                for index in waiting:
                    seed_generators(fold(prefix, index))
                    samples.append(dataset[index])
            else:
                samples = [dataset[index] for index in waiting]
        except Exception as error:
            failed_at = len(draw.indices) - len(list(waiting)) - 1
            return self._failed(error, f"index {draw.indices[failed_at]}", epoch)
        if self._refuse_none:
            for index, sample in zip(draw.indices, samples, strict=True):
                if sample is None:
                    return self._gave_none(index, epoch)
        return samples

    def _read_whole(self, draw: Draw) -> list[Any] | SampleError:
        try:
            samples = self.dataset.__getitems__(draw.indices)
        except Exception as error:
            return self._failed(error, f"one of the indices {shortened(draw.indices)}", draw.epoch)
        if self._refuse_none:
            for index, sample in zip(draw.indices, samples, strict=False):
                if sample is None:
                    return self._gave_none(index, draw.epoch)
        return samples  # type: ignore[no-any-return]

    def _failed(self, error: Exception, where: str, epoch: int) -> SampleError:
        return SampleError(
            f"{self._place.path}.dataset: {type(self.dataset).__name__} failed at {where} in epoch {epoch} with "
            f"{describe(error)}; fix or skip this sample; run dataset[index] to reproduce the error",
            error,
        )

    def _gave_none(self, index: int, epoch: int) -> SampleError:
        return SampleError(
            f"{self._place.path}.dataset: {type(self.dataset).__name__} gave None at index {index} in epoch {epoch}, "
            "expected a sample; a transform of the pipeline rejected it: leave the sample out, let the data set draw "
            "another one, or give a collate_fn of your own that drops None"
        )


def shortened(indices: list[int]) -> str:
    """Return the indices of a batch as text, at most eight of them."""
    shown = ", ".join(str(index) for index in indices[:8])
    return f"[{shown}, ... {len(indices)} in all]" if len(indices) > 8 else f"[{shown}]"
