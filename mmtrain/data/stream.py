"""The training data as one endless stream with a position."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sized
from typing import Any

from torch.utils.data import IterableDataset

from mmtrain.data.collate import is_built_in, resolve_collate
from mmtrain.data.custom_sampler import choose_source
from mmtrain.data.options import split_options
from mmtrain.data.reader import SeededReader, reads_whole_batches
from mmtrain.data.sampler import Draw, share
from mmtrain.data.workers.pool import WorkerPool, crowding
from mmtrain.errors import ConfigError
from mmtrain.types import Batch, Reading, StateDict


class Stream(ABC):
    """What the train loop reads from: batches without end, pass after pass.

    Attributes:
        dataset: the data set, or the object that the batches come from.
        batch_size: samples of one batch on this rank, None where an object of the user's decides.
        notices: sentences to report at start about what this stream cannot keep.
    """

    dataset: Any
    batch_size: int | None
    notices: list[str]
    can_skip = True  # whether `seek` goes to any offset; else only to one whose state is loaded

    @property
    @abstractmethod
    def iterations_per_epoch(self) -> int | None:
        """Iterations of one full pass, None when unknown."""

    @property
    @abstractmethod
    def samples(self) -> int | None:
        """Samples that all ranks together consume in one full pass, None when unknown."""

    def iterations_left(self, epoch: int, offset: int) -> int | None:
        """Iterations from a position to the end of its pass, None when unknown."""
        return None

    @abstractmethod
    def seek(self, epoch: int, offset: int) -> tuple[int, int]:
        """Go to a position: the next batch is the one that stands there.

        ``offset`` counts the samples that all ranks together have consumed in pass ``epoch``. Returns the position
        at which the stream really stands, which is (epoch + 1, 0) when nothing is left of the pass: the caller's
        progress must follow it.
        """

    @abstractmethod
    def __next__(self) -> Batch: ...

    @abstractmethod
    def close(self) -> None:
        """End the workers. The next batch, if one is taken, starts them again where the stream stands."""

    def report_readings(self) -> None:
        """Let every batch say which samples were read for it (`types.Batch.reading`); called before the first.

        Raises:
            ConfigError: this stream cannot know.
        """
        kind = type(self.dataset).__name__
        raise ConfigError(
            f"train_cfg.ledger: {kind} is iterable-style, so the sample indices of its batches are unknown; "
            "leave the ledger out, or give a data set with __getitem__ and __len__"
        )

    def state_dict(self) -> StateDict:
        """Return what the position does not say, as of the last batch handed over."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # noqa: B027 (most streams keep nothing)
        """Take back what `state_dict` gave; before or after `seek`."""

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __len__(self) -> int:
        if self.iterations_per_epoch is None:
            raise TypeError(f"{type(self).__name__} does not know its length")
        return self.iterations_per_epoch

    def __bool__(self) -> bool:
        return True


class TrainStream(Stream):
    """Batches of a map-style data set (``dataset[i]`` and ``len``) from any position, without end.

    The order is a function of (seed, epoch, offset), and randomness inside ``dataset[i]`` of (seed, epoch, i), or with
    ``per_sample=False`` of (seed, epoch, first sample of the global batch, rank); so any number of workers gives the
    same batches to the bit, and going to a position reads no sample before it. A data set with ``__getitems__`` of its
    own reads a whole batch in one call and is seeded once a batch in both cases. Workers live until `close`, and read
    ahead over the end of a pass; the position is counted when a batch is handed over, so reading ahead cannot lie.

    Args:
        dataset: anything with ``__getitem__`` and ``__len__``.
        batch_size: samples of one batch on this rank.
        sampler: None, ``dict(type='DefaultSampler'|'InfiniteSampler', shuffle=...)``, or a sampler of the user's
            that shards by rank itself; see `custom_sampler.choose_source`.
        shuffle: for ``sampler=None``; True if not said.
        drop_last: drop the end of a pass that fills no global batch.
        collate_fn: see `collate.resolve_collate`; torch's ``default_collate`` if not said.
        options: ``seed`` (required), ``rank``, ``world_size``, ``per_sample``, ``path``, see `options.Place`;
            ``num_workers``, ``pin_memory``, ``prefetch_factor``, ``persistent_workers``, ``worker_init_fn``,
            ``timeout``, ``multiprocessing_context``, see `options.WorkerOptions`.

    A batch has ``weight=0`` when this rank gets no sample of a pass's incomplete last batch; ``data`` is a stand-in.

    Raises:
        ConfigError: an empty data set, a batch that the data set cannot fill, or an option that cannot be.
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
        place, workers = split_options(options, path="train_dataloader")
        check_map_style(dataset, place.path)
        self.dataset = dataset
        self.batch_size = batch_size
        self.sampler = choose_source(sampler, dataset, batch_size, shuffle=shuffle, drop_last=drop_last, place=place)
        collate = resolve_collate(collate_fn, path=f"{place.path}.collate_fn")
        reader = SeededReader(dataset, collate, place=place, refuse_none=is_built_in(collate))
        self.notices = crowding(workers, place.path)
        if place.per_sample and reads_whole_batches(dataset):
            self.notices.append(
                f"{place.path}.dataset: {type(dataset).__name__} reads whole batches (__getitems__), so its randomness "
                "is seeded once a batch and depends on the batch size"
            )
        self._reader = reader
        self._place = place
        self._pool = WorkerPool(reader, workers, path=place.path)
        self._started = False
        self._from = (0, 0)  # where to start; behind `_last` once a batch was handed over
        self._last: Draw | None = None

    @property
    def iterations_per_epoch(self) -> int:
        return self.sampler.iterations_per_epoch

    @property
    def samples(self) -> int:
        return self.sampler.samples

    def iterations_left(self, epoch: int, offset: int) -> int:
        return self.sampler.iterations_left(epoch, offset)

    def seek(self, epoch: int, offset: int) -> tuple[int, int]:
        self._from, self._last, self._started = self.sampler.normalise(epoch, offset), None, False
        return self._from

    @property
    def position(self) -> tuple[int, int]:
        """Epoch and offset of the next batch."""
        if self._last is None:
            return self._from
        epoch, offset, _, samples, epoch_end, _ = self._last
        return (epoch + 1, 0) if epoch_end else (epoch, offset + samples)

    def __next__(self) -> Batch:
        if not self._started:
            self._pool.start(self.sampler.draws(*self.position))
            self._started = True
        draw, data = self._pool.take()
        self._last = draw
        if not self._reader.reports:
            return Batch(data, draw.samples, draw.epoch_end, draw.weight)
        start, _ = share(draw.offset, draw.samples, self._place.rank, self._place.world_size)
        reading = Reading(data.epoch, start, data.indices)
        return Batch(data.data, draw.samples, draw.epoch_end, draw.weight, reading)

    def report_readings(self) -> None:
        self._reader.reports = True

    def close(self) -> None:
        self._pool.close()
        self._started = False


def is_iterable_style(dataset: Any) -> bool:
    """Tell whether a data set can only be iterated over."""
    return isinstance(dataset, IterableDataset) or (
        hasattr(dataset, "__iter__") and not hasattr(type(dataset), "__getitem__")
    )


def check_map_style(dataset: Any, path: str) -> None:
    """Raise ConfigError unless ``dataset[i]`` and ``len(dataset)`` are there."""
    if is_iterable_style(dataset):
        raise ConfigError(
            f"{path}.dataset: {type(dataset).__name__} is iterable-style, expected __getitem__ and __len__; "
            "build_train_stream makes an IterableStream for it"
        )
    if not hasattr(type(dataset), "__getitem__") or not isinstance(dataset, Sized):
        raise ConfigError(
            f"{path}.dataset: found {type(dataset).__name__}, expected a data set with __getitem__ and __len__, or an "
            "iterable one"
        )
