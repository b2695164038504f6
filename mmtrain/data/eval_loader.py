"""The data of a validation or test: one ordered pass, as often as it is asked for."""

import math
from collections.abc import Iterator
from typing import Any

from mmtrain import dist
from mmtrain.data.collate import is_built_in, resolve_collate
from mmtrain.data.custom_sampler import is_own_order, sampler_maker
from mmtrain.data.iterable.stream import IterableStream
from mmtrain.data.options import split_options
from mmtrain.data.reader import SampleError, SeededReader
from mmtrain.data.sampler import Draw, check_sizes
from mmtrain.data.stream import check_map_style
from mmtrain.data.workers.pool import WorkerPool, crowding
from mmtrain.errors import ConfigError


class EvalLoader:
    """Batches of a map-style data set in order, every sample exactly once over all ranks.

    Sample i goes to rank ``i % world_size``, as in MMEngine, whose collection of results expects that order; nothing is
    padded or repeated. Every rank makes the same number of iterations; a rank that has no sample left in the last one
    gets None. Randomness inside ``dataset[i]`` depends on (seed, i) alone, so each validation sees the same data.
    Workers stay between passes unless ``persistent_workers=False``. Beginning a pass ends the one before.

    Args: see `stream.TrainStream`. ``shuffle``, ``drop_last`` and a sampler that shuffles are refused; a sampler of
        the user's that shards by rank itself is served.

    Raises:
        ConfigError: an empty data set, or an option that cannot be.
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
        place, workers = split_options(options, path="val_dataloader")
        check_map_style(dataset, place.path)
        check_sizes(len(dataset), batch_size, world_size=1, drop_last=False, path=place.path)
        refuse_cuts(shuffle=shuffle, drop_last=drop_last, path=place.path)
        self.dataset = dataset
        self.batch_size = batch_size
        collate = resolve_collate(collate_fn, path=f"{place.path}.collate_fn")
        reader = SeededReader(dataset, collate, place=place, refuse_none=is_built_in(collate), validation=True)
        self.notices = crowding(workers, place.path)
        self._place = place
        self._pass = 0
        self._keep_workers = workers.persistent_workers is not False
        self._sampler = _own_sampler(sampler, dataset, seed=place.seed, path=f"{place.path}.sampler")
        self._reader = reader
        self._pool = WorkerPool(reader, workers, path=place.path)

    def __len__(self) -> int:
        """Return the number of iterations of one pass, the same on every rank."""
        if self._sampler is not None:
            return math.ceil(len(self._sampler) / self.batch_size)
        return math.ceil(len(self.dataset) / (self.batch_size * self._place.world_size))

    def __iter__(self) -> Iterator[Any]:
        self._pass = mine = self._pass + 1
        self._pool.start(self._draws())
        for _ in range(len(self)):
            if self._pass != mine:
                raise RuntimeError("this iterator ended because another pass over the loader has started")
            yield self._pool.take()[1]
        if not self._keep_workers:
            self._pool.close()

    def stand_in(self) -> Any:
        """Return a batch of the first sample alone, for a rank that has none but must call the model all the same."""
        data = self._reader(Draw(0, 0, [0], 1, False))
        if isinstance(data, SampleError):
            data.raise_it()
        return data

    def close(self) -> None:
        """End the workers; the next pass starts new ones."""
        self._pool.close()

    def _draws(self) -> Iterator[Draw]:
        rank, world_size = self._place.rank, self._place.world_size
        mine = range(rank, len(self.dataset), world_size)
        indices = mine if self._sampler is None else [int(index) for index in self._sampler]
        for number in range(len(self)):
            start = number * self.batch_size
            chosen = list(indices[start : start + self.batch_size])
            yield Draw(0, start * world_size, chosen, len(chosen), number + 1 == len(self))


class IterableEvalLoader:
    """One pass over an iterable data set, as often as it is asked for, each time with the same randomness.

    The data set shards by rank itself. The length is unknown unless the data set has one.
    """

    def __init__(self, dataset: Any, batch_size: int, **options: Any) -> None:
        path = options.get("path", "val_dataloader")
        refuse_cuts(shuffle=options.pop("shuffle", None), drop_last=options.pop("drop_last", False), path=path)
        self._keep_workers = options.get("persistent_workers") is not False
        self._stream = IterableStream(dataset, batch_size, **{"path": path} | options, validation=True)
        self.notices = self._stream.notices
        self.dataset = dataset
        self.batch_size = batch_size

    def __len__(self) -> int:
        return len(self._stream)

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Any]:
        self._stream.seek(0, 0)
        for batch in self._stream:
            yield batch.data
            if batch.epoch_end:
                break
        if not self._keep_workers:
            self.close()

    def close(self) -> None:
        """End the workers; the next pass starts new ones."""
        self._stream.close()


def refuse_cuts(*, shuffle: bool | None, drop_last: bool, path: str) -> None:
    """Raise ConfigError for options by which a validation would not see every sample once, in order."""
    if shuffle:
        raise ConfigError(f"{path}.shuffle: found True, expected False: a validation goes through the data in order")
    if drop_last:
        raise ConfigError(f"{path}.drop_last: found True, expected False: a validation reads every sample once")


def _own_sampler(sampler: Any, dataset: Any, *, seed: int, path: str) -> Any:
    """Return the user's own sampler, or None when the loader's own order is meant."""
    if sampler is None:
        return None
    made = sampler_maker(sampler, dataset, seed=seed, path=path)()
    if not is_own_order(made):
        try:
            len(made)
        except TypeError:
            raise ConfigError(f"{path}: {type(made).__name__} has no length, expected a sampler with __len__") from None
        if dist.model_parallel() > 1:
            raise ConfigError(
                f"{path}: {type(made).__name__} divides samples among ranks itself, and under tensor parallelism some "
                "ranks must read the same; leave the sampler out, or name 'DefaultSampler'"
            )
        return made
    # A name without shuffle=False means shuffling in MMEngine too; only what was said is refused.
    if made.shuffle and not (isinstance(sampler, dict) and "shuffle" not in sampler):
        raise ConfigError(f"{path}.shuffle: found True, expected False: a validation goes through the data in order")
    return None
