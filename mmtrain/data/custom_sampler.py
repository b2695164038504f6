"""A user's own sampler as a source of draws, and the choice of the source from the config's ``sampler``."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

from mmtrain import randomness
from mmtrain.data.options import Place
from mmtrain.data.sampler import DefaultSampler, Draw, IndexSource, InfiniteSampler, PositionSampler, check_sizes
from mmtrain.errors import ConfigError
from mmtrain.progress import iterations_per_epoch
from mmtrain.registry import DATA_SAMPLERS, build

_END = object()


class CustomSampler:
    """Makes draws of the indices that a user's sampler yields.

    The sampler shards by rank itself, as MMEngine's do, and gives every rank the same number of indices. Each pass
    iterates over it anew, after ``set_epoch(epoch)`` where it has that, and with the global generators seeded by
    (seed, epoch) and put back afterwards, so that its order depends on the position alone however it draws. Skipping
    costs integers only: the data set is not read. A sampler that yields more than its length is taken to be endless:
    it is read on and on, ``len(sampler)`` indices a pass.

    ``make`` gives a fresh sampler; for one that was handed in ready it gives that one.
    """

    def __init__(self, make: Callable[[], Iterable[int]], batch_size: int, *, place: Place, drop_last: bool) -> None:
        self._make = make
        sampler = make()
        self.order: dict[str, Any] = {"sampler": type(sampler).__name__, "drop_last": drop_last}
        try:
            self._length = len(sampler)  # type: ignore[arg-type]
        except TypeError:
            raise ConfigError(
                f"{place.path}.sampler: {type(sampler).__name__} has no length, expected a sampler with __len__ (the "
                "number of indices that this rank reads in one pass)"
            ) from None
        self._first: Iterable[int] | None = sampler
        self._batch_size = batch_size
        self._place = place
        self._drop_last = drop_last
        self._endless: Iterator[int] | None = None
        self._endless_passes = 0
        self._held: tuple[int, list[int]] = (-1, [])
        check_sizes(self._length, batch_size, world_size=1, drop_last=drop_last, path=place.path)

    @property
    def samples(self) -> int:
        dropped = self._length % self._batch_size if self._drop_last else 0
        return (self._length - dropped) * self._place.world_size

    @property
    def iterations_per_epoch(self) -> int:
        return iterations_per_epoch(self._length, self._batch_size, drop_last=self._drop_last)

    def normalise(self, epoch: int, offset: int) -> tuple[int, int]:
        needed = self._batch_size if self._drop_last else 1
        left = len(self._indices(epoch)) - offset // self._place.world_size
        return (epoch + 1, 0) if left < needed else (epoch, offset)

    def iterations_left(self, epoch: int, offset: int) -> int:
        left = len(self._indices(epoch)) - offset // self._place.world_size
        return iterations_per_epoch(left, self._batch_size, drop_last=self._drop_last)

    def draws(self, epoch: int, offset: int) -> Iterator[Draw]:
        """Give the draws from this position on, pass after pass, without end."""
        world_size = self._place.world_size
        epoch, offset = self.normalise(epoch, offset)
        while True:
            start = offset // world_size
            indices = self._indices(epoch)[start : start + self._batch_size]
            if not indices:
                raise ConfigError(f"{self._place.path}.sampler: it gave no index in pass {epoch}")
            samples = len(indices) * world_size
            following = self.normalise(epoch, offset + samples)
            yield Draw(epoch, offset, indices, samples, following[0] != epoch)
            epoch, offset = following

    def _indices(self, epoch: int) -> list[int]:
        if self._held[0] != epoch:
            read = self._read_pass if self._endless is None else self._read_on
            self._held = (epoch, [int(index) for index in read(epoch)])
        return self._held[1]

    def _read_pass(self, epoch: int) -> list[int]:
        sampler = self._first if self._first is not None else self._make()
        self._first = None
        with _seeded(randomness.mix(randomness.STREAM_SHUFFLE, self._place.seed, epoch)):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
            iterator = iter(sampler)
            indices = list(islice(iterator, self._length))
            if next(iterator, _END) is _END:
                return indices
        self._endless = iter(self._make())
        return self._read_on(epoch)

    def _read_on(self, epoch: int) -> list[int]:
        """Read an endless sampler up to pass ``epoch``: every pass under its own seed, so the way does not matter."""
        if self._endless is None or epoch < self._endless_passes:
            self._endless, self._endless_passes = iter(self._make()), 0
        indices: list[int] = []
        for number in range(self._endless_passes, epoch + 1):
            with _seeded(randomness.mix(randomness.STREAM_SHUFFLE, self._place.seed, number)):
                indices = list(islice(self._endless, self._length))
        self._endless_passes = epoch + 1
        return indices


@contextmanager
def _seeded(value: int) -> Iterator[None]:
    """Seed the global generators inside, and put them back afterwards."""
    before = randomness.capture()
    randomness.seed_generators(value)
    try:
        yield
    finally:
        randomness.restore(before)


def choose_source(
    sampler: Any, dataset: Any, batch_size: int, *, shuffle: bool | None, drop_last: bool, place: Place
) -> IndexSource:
    """Return what gives the stream's draws.

    ``sampler`` is None (``shuffle`` rules then, True if not said), a dict with ``type`` and arguments, or a ready
    sampler. ``DefaultSampler`` and ``InfiniteSampler``, MMEngine's or ours, both mean the stream's own order.

    Raises:
        ConfigError: an empty data set, a batch size that does not fit, or ``shuffle`` beside a sampler.
    """
    check_sizes(len(dataset), batch_size, world_size=place.world_size, drop_last=False, path=place.path)
    seed = place.seed
    if sampler is not None:
        if shuffle is not None:
            raise ConfigError(
                f"{place.path}.shuffle: found beside {place.path}.sampler, expected one of the two; write "
                f"sampler=dict(type='DefaultSampler', shuffle={shuffle!r})"
            )
        make = sampler_maker(sampler, dataset, seed=seed, path=f"{place.path}.sampler")
        made = make()
        if not is_own_order(made):
            return CustomSampler(make, batch_size, place=place, drop_last=drop_last)
        shuffle = bool(made.shuffle)
        # A ready sampler of MMEngine has drawn a seed of its own, which no resumed run could draw again.
        seed = made.seed if isinstance(made, DefaultSampler | InfiniteSampler) and made.seed is not None else seed
    check_sizes(len(dataset), batch_size, world_size=place.world_size, drop_last=drop_last, path=place.path)
    return PositionSampler(
        len(dataset),
        batch_size,
        seed=seed,
        shuffle=shuffle is not False,
        drop_last=drop_last,
        rank=place.rank,
        world_size=place.world_size,
    )


def sampler_maker(sampler: Any, dataset: Any, *, seed: int, path: str) -> Callable[[], Any]:
    """Return a function that makes the sampler, or gives the ready one."""
    if not isinstance(sampler, Mapping):
        return lambda: sampler
    return lambda: build(DATA_SAMPLERS, sampler, path=path, dataset=dataset, seed=seed)


def is_own_order(sampler: Any) -> bool:
    """Tell whether a sampler, ours or MMEngine's, stands for the stream's own order."""
    kind = type(sampler)
    return isinstance(sampler, DefaultSampler | InfiniteSampler) or (
        kind.__module__ == "mmengine.dataset.sampler" and kind.__name__ in ("DefaultSampler", "InfiniteSampler")
    )
