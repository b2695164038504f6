"""The training data as one endless stream with a position."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sized
from typing import Any, NamedTuple

from torch.utils.data import IterableDataset

from mmtrain.data.collate import is_built_in, resolve_collate
from mmtrain.data.custom_sampler import choose_source
from mmtrain.data.options import LoaderContext, WorkerOptions, split_options
from mmtrain.data.reader import SeededReader, reads_whole_batches
from mmtrain.data.sampler import BatchIndices, rank_slice
from mmtrain.data.watch import watch_for
from mmtrain.data.workers.pool import WorkerPool, crowding
from mmtrain.errors import ConfigError
from mmtrain.types import Batch, SampleIndices, StateDict


class Stream(ABC):
    """The training data as the train loop reads it: batches without end, epoch after epoch.

    A hook may change the dataset (its pipeline, an attribute) or replace ``collate_fn``. With data workers this takes
    effect at the next epoch, also with ``persistent_workers=True``; without workers at once.

    Attributes:
        batch_size: samples per batch on this rank, None if an object of the user decides.
        notices: sentences to report at start about what this stream cannot save or guarantee.
    """

    batch_size: int | None
    notices: list[str]
    _reader: Any
    _pool: WorkerPool
    can_skip = True  # whether `seek` accepts any offset, or only one whose state is loaded

    @property
    def dataset(self) -> Any:
        """The dataset, or the object that the batches come from."""
        return self._reader.dataset

    @property
    def collate_fn(self) -> Any:
        """The function that makes a batch of samples; a hook may replace it."""
        return self._reader.collate

    @collate_fn.setter
    def collate_fn(self, function: Any) -> None:
        self._reader.collate = function

    # ---- names of torch's DataLoader that hooks written for MMEngine use
    @property
    def num_workers(self) -> int:
        return self._pool.num_workers

    @property
    def persistent_workers(self) -> bool:
        return self._pool.keeps_workers

    @property
    def _iterator(self) -> None:
        """Set to None by hooks for MMEngine that want new workers at the next epoch."""
        return None

    @_iterator.setter
    def _iterator(self, value: None) -> None:
        self._pool.renew()

    @property
    def _dataloader(self) -> Stream:
        return self

    @property
    @abstractmethod
    def iterations_per_epoch(self) -> int | None:
        """Iterations of one full epoch, None if unknown."""

    @property
    @abstractmethod
    def samples(self) -> int | None:
        """Samples that all ranks together consume in one full epoch, None if unknown."""

    def iterations_left(self, epoch: int, offset: int) -> int | None:
        """Iterations from a position to the end of its epoch, None if unknown."""
        return None

    def sizes_ahead(self, epoch: int, offset: int, count: int) -> list[int] | None:
        """Samples of each of the ``count`` iterations from a position on, over all ranks; None if unknown."""
        return None

    @property
    def has_equal_batches(self) -> bool:
        """Whether it is known that all batches have the same number of samples."""
        return False

    @abstractmethod
    def seek(self, epoch: int, offset: int) -> tuple[int, int]:
        """Move to a position, so that the next batch is the one there.

        ``offset`` counts the samples of epoch ``epoch`` that all ranks together have consumed. Returns the position
        that was reached, which the caller's progress must follow: (epoch + 1, 0) if nothing is left of the epoch.
        """

    @abstractmethod
    def __next__(self) -> Batch: ...

    @abstractmethod
    def close(self) -> None:
        """End the workers.

        The next batch, if one is taken, starts new ones, which get the dataset as it is then and continue at the same
        position.
        """

    def report_indices(self) -> None:
        """Add the sample indices to every batch (`types.Batch.indices`); called before the first one is taken.

        Raises:
            ConfigError: this stream does not know them.
        """
        kind = type(self.dataset).__name__
        raise ConfigError(
            f"train_cfg.ledger: {kind} is iterable-style, so the sample indices of its batches are unknown; "
            "leave the ledger out, or use a dataset with __getitem__ and __len__"
        )

    def state_dict(self) -> StateDict:
        """Return what the position does not determine, as of the last batch that was taken."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # noqa: B027 (most streams have no state)
        """Restore what `state_dict` returned, before or after `seek`."""

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __len__(self) -> int:
        if self.iterations_per_epoch is None:
            raise TypeError(f"{type(self).__name__} has no known length")
        return self.iterations_per_epoch

    def __bool__(self) -> bool:
        return True


class TrainStream(Stream):
    """Batches of a map-style dataset (``dataset[i]`` and ``len``) from any position, without end.

    The order is a function of (seed, epoch, offset). Randomness inside ``dataset[i]`` is a function of (seed, epoch,
    i), or with ``per_sample=False`` of (seed, epoch, offset, rank). So the batches are bit-for-bit the same with any
    number of workers, and moving to a position reads no sample before it. A dataset with ``__getitems__`` reads a whole
    batch in one call and is seeded once per batch in both cases. The position counts only batches that were taken, not
    what workers have read ahead.

    Args:
        dataset: an object with ``__getitem__`` and ``__len__``.
        batch_size: samples per batch on this rank.
        sampler: None, ``dict(type='DefaultSampler'|'InfiniteSampler', shuffle=...)``, or a user's sampler, which shards
            by rank itself; see `custom_sampler.choose_source`.
        shuffle: for ``sampler=None``; defaults to True.
        drop_last: drop the incomplete last global batch of an epoch.
        collate_fn: see `collate.resolve_collate`; defaults to torch's ``default_collate``.
        options: ``seed`` (required), ``rank``, ``world_size``, ``per_sample``, ``path``, see `options.LoaderContext`;
            ``num_workers``, ``pin_memory``, ``prefetch_factor``, ``persistent_workers``, ``worker_init_fn``,
            ``timeout``, ``multiprocessing_context``, see `options.WorkerOptions`.

    A batch has ``weight=0`` if this rank gets no sample of the incomplete last batch of an epoch; its ``data`` is then
    a stand-in.

    Raises:
        ConfigError: an empty dataset, a batch that it cannot fill, or an invalid option.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        *,
        sampler: Any = None,
        shuffle: bool | None = None,
        drop_last: bool = False,
        collate_fn: Any = None,
        **options: Any,
    ) -> None:
        context, workers = split_options(options, path="train_dataloader")
        check_map_style(dataset, context.path)
        self.batch_size = batch_size
        self.sampler = choose_source(
            sampler, dataset, batch_size, shuffle=shuffle, drop_last=drop_last, context=context
        )
        self._reader, self._pool, self.notices = open_reader(dataset, collate_fn, context, workers)
        self.watch = watch_for(dataset)
        self._reader.watch = self.watch if workers.num_workers else None
        if context.per_sample and reads_whole_batches(dataset):
            self.notices.append(
                f"{context.path}.dataset: {type(dataset).__name__} reads whole batches (__getitems__), so its "
                "randomness is seeded once per batch and depends on the batch size"
            )
        self._context = context
        self._started = False
        self._start = (0, 0)  # the position before the first batch is taken
        self._last: BatchIndices | None = None  # the last batch that was taken

    @property
    def iterations_per_epoch(self) -> int:
        return self.sampler.iterations_per_epoch

    @property
    def samples(self) -> int:
        return self.sampler.samples

    def iterations_left(self, epoch: int, offset: int) -> int:
        return self.sampler.iterations_left(epoch, offset)

    def sizes_ahead(self, epoch: int, offset: int, count: int) -> list[int]:
        return self.sampler.sizes_ahead(epoch, offset, count)

    def seek(self, epoch: int, offset: int) -> tuple[int, int]:
        self._start = self.sampler.normalise(epoch, offset)
        self._last = None
        self._started = False
        return self._start

    @property
    def position(self) -> tuple[int, int]:
        """Epoch and offset of the next batch."""
        if self._last is None:
            return self._start
        epoch, offset, _, samples, epoch_end, _ = self._last
        return (epoch + 1, 0) if epoch_end else (epoch, offset + samples)

    def __next__(self) -> Batch:
        if self._last is not None and self._last.epoch_end and self._pool.is_stale:
            self._started = False
        if not self._started:
            self._pool.start(self._requests())
            self._started = True
        batch, data = self._pool.take()
        self._last = batch
        if not self._reader.returns_indices:
            return Batch(data, batch.samples, batch.epoch_end, batch.weight)
        start, _ = rank_slice(batch.offset, batch.samples, self._context.rank, self._context.world_size)
        indices = SampleIndices(data.epoch, start, data.indices)
        return Batch(data.data, batch.samples, batch.epoch_end, batch.weight, indices)

    def _requests(self) -> Iterator[BatchIndices]:
        """Yield the batches from the position on, to the end of the epoch if its workers end there."""
        endless = self._pool.keeps_workers or not self._pool.num_workers
        for batch in self.sampler.batch_indices(*self.position):
            yield batch
            if batch.epoch_end and not endless:
                return

    def report_indices(self) -> None:
        self._reader.returns_indices = True

    def close(self) -> None:
        self._pool.close()
        self._started = False


class OpenReader(NamedTuple):
    """A reader of a map-style dataset, the pool that calls it, and the notices to report at start."""

    reader: SeededReader
    pool: WorkerPool
    notices: list[str]


def open_reader(
    dataset: Any, collate_fn: Any, context: LoaderContext, workers: WorkerOptions, *, validation: bool = False
) -> OpenReader:
    """Make what reads a map-style dataset, in training and in validation. No worker is started yet."""
    collate = resolve_collate(collate_fn, path=f"{context.path}.collate_fn")
    reader = SeededReader(dataset, collate, context=context, refuse_none=is_built_in(collate), validation=validation)
    return OpenReader(reader, WorkerPool(reader, workers, path=context.path), crowding(workers, context.path))


def is_iterable_style(dataset: Any) -> bool:
    """Return whether a dataset can only be iterated over."""
    return isinstance(dataset, IterableDataset) or (
        hasattr(dataset, "__iter__") and not hasattr(type(dataset), "__getitem__")
    )


def check_map_style(dataset: Any, path: str) -> None:
    """Raise ConfigError unless the dataset has ``__getitem__`` and ``__len__``."""
    if is_iterable_style(dataset):
        raise ConfigError(
            f"{path}.dataset: {type(dataset).__name__} is iterable-style, expected __getitem__ and __len__; "
            "build_train_stream makes an IterableStream for it"
        )
    if not hasattr(type(dataset), "__getitem__") or not isinstance(dataset, Sized):
        raise ConfigError(
            f"{path}.dataset: found {type(dataset).__name__}, expected a dataset with __getitem__ and __len__, or an "
            "iterable one"
        )
