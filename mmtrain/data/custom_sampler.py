"""A user's sampler as a source of batch indices, and the choice of the source from the config's ``sampler``."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np

from mmtrain import randomness
from mmtrain.data.options import LoaderContext
from mmtrain.data.sampler import (
    BatchIndices,
    DefaultSampler,
    IndexSource,
    InfiniteSampler,
    PositionSampler,
    check_sizes,
    sizes_from,
)
from mmtrain.errors import ConfigError
from mmtrain.progress import iterations_per_epoch
from mmtrain.registry import DATA_SAMPLERS, build

_END = object()


class CustomSampler:
    """Divides the indices that a user's sampler yields into batches.

    The sampler shards by rank itself, as MMEngine's do, and yields the same number of indices on every rank. Each epoch
    iterates over it once, after ``set_epoch(epoch)`` if it has that method. The global generators are seeded by (seed,
    epoch) meanwhile and restored afterwards, so its order depends only on the position, whatever it draws from.
    Skipping reads indices only, not the dataset. A sampler that yields more than its length counts as endless:
    ``len(sampler)`` of its indices are an epoch.

    ``make`` returns a new sampler, or the same one each time if the config holds a ready-made object.
    """

    def __init__(
        self, make: Callable[[], Iterable[int]], batch_size: int, *, context: LoaderContext, drop_last: bool
    ) -> None:
        self._make = make
        sampler = make()
        self.order: dict[str, Any] = {"sampler": type(sampler).__name__, "drop_last": drop_last}
        try:
            self._length = len(sampler)  # type: ignore[arg-type]
        except TypeError:
            raise ConfigError(
                f"{context.path}.sampler: {type(sampler).__name__} has no length, expected a sampler with __len__ (the "
                "number of indices that this rank reads in one epoch)"
            ) from None
        self._first: Iterable[int] | None = sampler
        self._batch_size = batch_size
        self._context = context
        self._drop_last = drop_last
        self._endless: Iterator[int] | None = None
        self._endless_epochs = 0
        self._cached_epoch = (-1, _compact(()))
        check_sizes(self._length, batch_size, world_size=1, drop_last=drop_last, path=context.path)

    @property
    def samples(self) -> int:
        dropped = self._length % self._batch_size if self._drop_last else 0
        return (self._length - dropped) * self._context.world_size

    @property
    def iterations_per_epoch(self) -> int:
        return iterations_per_epoch(self._length, self._batch_size, drop_last=self._drop_last)

    def normalise(self, epoch: int, offset: int) -> tuple[int, int]:
        needed = self._batch_size if self._drop_last else 1
        left = len(self._indices(epoch)) - offset // self._context.world_size
        return (epoch + 1, 0) if left < needed else (epoch, offset)

    def iterations_left(self, epoch: int, offset: int) -> int:
        left = len(self._indices(epoch)) - offset // self._context.world_size
        return iterations_per_epoch(left, self._batch_size, drop_last=self._drop_last)

    def sizes_ahead(self, epoch: int, offset: int, count: int) -> list[int]:
        world_size = self._context.world_size
        left = len(self._indices(epoch)) - offset // world_size
        sizes = sizes_from(left, self._length, self._batch_size, count, drop_last=self._drop_last)
        return [size * world_size for size in sizes]

    def batch_indices(self, epoch: int, offset: int) -> Iterator[BatchIndices]:
        world_size = self._context.world_size
        epoch, offset = self.normalise(epoch, offset)
        while True:
            start = offset // world_size
            indices = self._indices(epoch)[start : start + self._batch_size].tolist()
            if not indices:
                raise ConfigError(f"{self._context.path}.sampler: it yielded no index in epoch {epoch}")
            samples = len(indices) * world_size
            following = self.normalise(epoch, offset + samples)
            yield BatchIndices(epoch, offset, indices, samples, following[0] != epoch)
            epoch, offset = following

    def _indices(self, epoch: int) -> np.ndarray:
        if self._cached_epoch[0] != epoch:
            read = self._read_epoch if self._endless is None else self._read_on
            self._cached_epoch = (epoch, read(epoch))
        return self._cached_epoch[1]

    def _read_epoch(self, epoch: int) -> np.ndarray:
        sampler = self._first if self._first is not None else self._make()
        self._first = None
        with _seeded(randomness.mix(randomness.STREAM_SHUFFLE, self._context.seed, epoch)):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
            iterator = iter(sampler)
            indices = _compact(islice(iterator, self._length))
            if next(iterator, _END) is _END:
                return indices
        self._endless = iter(self._make())
        return self._read_on(epoch)

    def _read_on(self, epoch: int) -> np.ndarray:
        """Read an endless sampler up to an epoch. Each epoch has its seed, so what was read before does not matter."""
        if self._endless is None or epoch < self._endless_epochs:
            self._endless, self._endless_epochs = iter(self._make()), 0
        indices = _compact(())
        for number in range(self._endless_epochs, epoch + 1):
            with _seeded(randomness.mix(randomness.STREAM_SHUFFLE, self._context.seed, number)):
                indices = _compact(islice(self._endless, self._length))
        self._endless_epochs = epoch + 1
        return indices


def _compact(indices: Iterable[int]) -> np.ndarray:
    """The indices of an epoch in 8 bytes each; a list of Python's integers takes ten times as much."""
    return np.fromiter(map(int, indices), np.int64)


@contextmanager
def _seeded(value: int) -> Iterator[None]:
    """Seed the global generators inside, and restore them afterwards."""
    before = randomness.capture()
    randomness.seed_generators(value)
    try:
        yield
    finally:
        randomness.restore(before)


def choose_source(
    sampler: Any, dataset: Any, batch_size: int, *, shuffle: bool | None, drop_last: bool, context: LoaderContext
) -> IndexSource:
    """Return the source of the stream's batch indices.

    ``sampler`` is None (then ``shuffle`` decides, which defaults to True), a dict with ``type`` and arguments, or a
    ready-made sampler. ``DefaultSampler`` and ``InfiniteSampler``, MMEngine's or mmtrain's, mean the built-in order.

    Raises:
        ConfigError: an empty dataset, an invalid batch size, or both ``shuffle`` and a sampler.
    """
    check_sizes(len(dataset), batch_size, world_size=context.world_size, drop_last=False, path=context.path)
    seed = context.seed
    if sampler is not None:
        if shuffle is not None:
            raise ConfigError(
                f"{context.path}.shuffle: found together with {context.path}.sampler, expected one of the two; write "
                f"sampler=dict(type='DefaultSampler', shuffle={shuffle!r})"
            )
        make = sampler_maker(sampler, dataset, seed=seed, path=f"{context.path}.sampler")
        made = make()
        if not is_built_in_order(made):
            return CustomSampler(make, batch_size, context=context, drop_last=drop_last)
        shuffle = bool(made.shuffle)
        # A ready-made sampler of MMEngine has drawn a random seed, which a resumed run could not draw again.
        seed = made.seed if isinstance(made, DefaultSampler | InfiniteSampler) and made.seed is not None else seed
    check_sizes(len(dataset), batch_size, world_size=context.world_size, drop_last=drop_last, path=context.path)
    return PositionSampler(
        len(dataset),
        batch_size,
        seed=seed,
        shuffle=shuffle is not False,
        drop_last=drop_last,
        rank=context.rank,
        world_size=context.world_size,
    )


def sampler_maker(sampler: Any, dataset: Any, *, seed: int, path: str) -> Callable[[], Any]:
    """Return a function that makes the sampler, or returns the ready-made one."""
    if not isinstance(sampler, Mapping):
        return lambda: sampler
    return lambda: build(DATA_SAMPLERS, sampler, path=path, dataset=dataset, seed=seed)


def is_built_in_order(sampler: Any) -> bool:
    """Return whether a sampler, mmtrain's or MMEngine's, means the stream's built-in order."""
    kind = type(sampler)
    return isinstance(sampler, DefaultSampler | InfiniteSampler) or (
        kind.__module__ == "mmengine.dataset.sampler" and kind.__name__ in ("DefaultSampler", "InfiniteSampler")
    )
