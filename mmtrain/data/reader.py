"""Reading a batch, in a data worker, or in the main process if there are no workers."""

import pickle
import traceback
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from torch.utils.data import Subset

from mmtrain.data.options import LoaderContext
from mmtrain.data.sample_seeder import SampleSeeder
from mmtrain.data.sampler import BatchIndices
from mmtrain.data.watch import DatasetWatch
from mmtrain.errors import RunError
from mmtrain.randomness import STREAM_BATCH, STREAM_SAMPLE, STREAM_VAL, fold, mix, seed_generators

Collate = Callable[[list[Any]], Any]


class IndexedBatch(NamedTuple):
    """A batch with the epoch and the sample indices (int64) that the reader read; workers send it."""

    data: Any
    epoch: int
    indices: bytes


@dataclass
class SampleError:
    """An error while a batch was read: the message, the exception and, from a worker, its traceback.

    It is sent to the main process as a result, in place of the batch, and raised there.
    """

    sentence: str
    error: BaseException | None = None
    trace: str = ""

    def raise_it(self) -> NoReturn:
        """Raise the message as a RunError, chained to the original exception."""
        if self.error is not None and self.trace:
            self.error.__cause__ = RuntimeError(f"in a data worker:\n{self.trace}")
        raise RunError(self.sentence) from self.error

    def packed(self) -> "SampleError":
        """Return a copy that can be pickled: an exception that cannot is replaced by a RuntimeError."""
        if self.error is None:
            return self
        trace = "".join(traceback.format_exception(self.error))
        try:
            error = pickle.loads(pickle.dumps(self.error))
        except Exception:
            error = RuntimeError(describe(self.error))
        return SampleError(self.sentence, error if isinstance(error, BaseException) else None, trace)


def describe(error: BaseException) -> str:
    """Return the type and message of an exception on one line."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def reads_whole_batches(dataset: Any) -> bool:
    """Return whether the dataset has ``__getitems__``, as those of Hugging Face have.

    That of a plain ``torch.utils.data.Subset`` only passes the indices on, so the wrapped dataset decides.
    """
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return callable(getattr(dataset, "__getitems__", None))


class SeededReader:
    """Reads the samples of a `BatchIndices`, with all generators seeded from the position.

    With ``per_sample`` each ``dataset[i]`` is read as if the generators of Python, numpy and torch were seeded before
    it by (seed, epoch, i); `SampleSeeder` leaves out those that the dataset does not use. Otherwise they are seeded
    once per batch by (seed, epoch, offset, rank). A dataset with ``__getitems__`` reads a whole batch in one call, so
    it is seeded once per batch in both cases. ``validation`` seeds from the validation stream, where all epochs are the
    same.

    A call returns the result of ``collate``, None for a batch without samples, or a `SampleError`. With
    ``returns_indices`` the result of ``collate`` is wrapped in an `IndexedBatch`.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Collate,
        *,
        context: LoaderContext,
        refuse_none: bool = False,
        validation: bool = False,
    ) -> None:
        self.dataset = dataset
        self.collate = collate
        self.returns_indices = False
        self._context = context
        self._refuse_none = refuse_none
        self._sample_stream = STREAM_VAL if validation else STREAM_SAMPLE
        self._batch_stream = STREAM_VAL if validation else STREAM_BATCH
        self._whole = reads_whole_batches(dataset)
        self._per_sample = context.per_sample and not self._whole
        self._seeder = SampleSeeder()
        self._prefix_of, self._prefix_value = (-1, -1), 0
        self.watch: DatasetWatch | None = None

    def __call__(self, batch: BatchIndices) -> Any:
        if not batch.indices:
            return None
        if self.watch is not None:
            self.watch.look(self.dataset)
        if not self._per_sample:
            seed_generators(fold(fold(self._prefix(self._batch_stream, batch.epoch), batch.offset), self._context.rank))
        samples = self._read_whole(batch) if self._whole else self._read_each(batch)
        if isinstance(samples, SampleError):
            return samples
        try:
            data = self.collate(samples)
            if not self.returns_indices:
                return data
            return IndexedBatch(data, batch.epoch, array("q", batch.indices[: len(samples)]).tobytes())
        except Exception as error:
            name = getattr(self.collate, "__name__", type(self.collate).__name__)
            return SampleError(
                f"{self._context.path}.collate_fn: {name} raised {describe(error)} on the samples "
                f"{shortened(batch.indices)} of {type(self.dataset).__name__}. Choose one that fits: 'pad_collate' for "
                "samples of different sizes, 'pseudo_collate' for MMEngine's data elements, or your own function.",
                error,
            )

    def _prefix(self, stream: int, epoch: int) -> int:
        """``mix(stream, seed, epoch)``, cached during an epoch."""
        if self._prefix_of != (stream, epoch):
            self._prefix_of, self._prefix_value = (stream, epoch), mix(stream, self._context.seed, epoch)
        return self._prefix_value

    def _read_each(self, batch: BatchIndices) -> list[Any] | SampleError:
        dataset, epoch = self.dataset, batch.epoch
        samples: list[Any] = []
        try:
            if self._per_sample:
                self._seeder.read(dataset, batch.indices, self._prefix(self._sample_stream, epoch), samples)
            else:
                for index in batch.indices:
                    samples.append(dataset[index])
        except Exception as error:
            return self._failed(error, f"dataset[{batch.indices[len(samples)]}]", epoch)
        if self._refuse_none:
            for index, sample in zip(batch.indices, samples, strict=True):
                if sample is None:
                    return self._got_none(index, epoch)
        return samples

    def _read_whole(self, batch: BatchIndices) -> list[Any] | SampleError:
        try:
            samples = self.dataset.__getitems__(batch.indices)
        except Exception as error:
            return self._failed(error, f"dataset.__getitems__({shortened(batch.indices)})", batch.epoch)
        if self._refuse_none:
            for index, sample in zip(batch.indices, samples, strict=False):
                if sample is None:
                    return self._got_none(index, batch.epoch)
        return samples  # type: ignore[no-any-return]

    def _failed(self, error: Exception, call: str, epoch: int) -> SampleError:
        return SampleError(
            f"{self._context.path}.dataset: {call} of {type(self.dataset).__name__} raised {describe(error)} (epoch "
            f"{epoch + 1}). Fix or skip this sample; run {call} to reproduce.",
            error,
        )

    def _got_none(self, index: int, epoch: int) -> SampleError:
        return SampleError(
            f"{self._context.path}.dataset: dataset[{index}] of {type(self.dataset).__name__} returned None (epoch "
            f"{epoch + 1}), expected a sample. A transform may have rejected it: skip the sample, let the dataset "
            "return another one, or use a collate_fn that drops None."
        )


def shortened(indices: list[int]) -> str:
    """Return the indices of a batch as text, the first eight if there are more."""
    shown = ", ".join(str(index) for index in indices[:8])
    return f"[{shown}, ... {len(indices)} in all]" if len(indices) > 8 else f"[{shown}]"
