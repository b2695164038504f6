"""The data of a validation or test: each iteration over a loader is one pass over the dataset, in order."""

import math
from collections.abc import Iterator
from typing import Any

from mmtrain import dist
from mmtrain.data.custom_sampler import is_built_in_order, sampler_maker
from mmtrain.data.iterable.stream import IterableStream, NoBatchError
from mmtrain.data.options import split_options
from mmtrain.data.sampler import BatchIndices, check_sizes
from mmtrain.data.stream import check_map_style, open_reader
from mmtrain.errors import ConfigError


class EvalLoader:
    """Batches of a map-style dataset in order, every sample exactly once over all ranks.

    Sample i goes to rank ``i % world_size``, as in MMEngine, which collects results in that order. Nothing is padded or
    repeated. Every rank makes the same number of iterations; a rank without a sample in the last one gets None.
    Randomness inside ``dataset[i]`` depends only on (seed, i), so each validation sees the same data. Each pass starts
    new workers, unless ``persistent_workers=True`` and the dataset has not changed in this process. Starting a pass
    ends the one before.

    Args: see `stream.TrainStream`. ``shuffle``, ``drop_last`` and a sampler that shuffles are refused. A user's sampler
        must shard by rank itself.

    Raises:
        ConfigError: an empty dataset, or an invalid option.
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
        context, workers = split_options(options, path="val_dataloader")
        check_map_style(dataset, context.path)
        check_sizes(len(dataset), batch_size, world_size=1, drop_last=False, path=context.path)
        refuse_cuts(shuffle=shuffle, drop_last=drop_last, path=context.path)
        self.dataset = dataset
        self.batch_size = batch_size
        _, self._pool, self.notices = open_reader(dataset, collate_fn, context, workers, validation=True)
        self._context = context
        self._pass = 0
        self._keep_workers = workers.persistent_workers is True
        self._sampler = _users_sampler(sampler, dataset, seed=context.seed, path=f"{context.path}.sampler")

    def __len__(self) -> int:
        """Return the number of iterations of one pass, the same on every rank."""
        if self._sampler is not None:
            return math.ceil(len(self._sampler) / self.batch_size)
        return math.ceil(len(self.dataset) / (self.batch_size * self._context.world_size))

    def __iter__(self) -> Iterator[Any]:
        self._pass += 1
        current = self._pass
        self._pool.start(self._batch_indices())
        for _ in range(len(self)):
            if self._pass != current:
                raise RuntimeError("this iterator ended because another pass over the loader has started")
            yield self._pool.take()[1]
        if not self._keep_workers:
            self._pool.close()

    def close(self) -> None:
        """End the workers; the next pass starts new ones."""
        self._pool.close()

    def _batch_indices(self) -> Iterator[BatchIndices]:
        rank, world_size = self._context.rank, self._context.world_size
        indices = range(rank, len(self.dataset), world_size) if self._sampler is None else list(map(int, self._sampler))
        for number in range(len(self)):
            start = number * self.batch_size
            chosen = list(indices[start : start + self.batch_size])
            yield BatchIndices(0, start * world_size, chosen, len(chosen), number + 1 == len(self))


class IterableEvalLoader:
    """Batches of an iterable dataset. Each iteration is one pass over it, with the same randomness.

    The dataset shards by rank itself; the shares of ranks may differ and be empty. The length is unknown unless the
    dataset has one.
    """

    def __init__(self, dataset: Any, batch_size: int, **options: Any) -> None:
        path = options.get("path", "val_dataloader")
        refuse_cuts(shuffle=options.pop("shuffle", None), drop_last=options.pop("drop_last", False), path=path)
        self._keep_workers = options.get("persistent_workers") is True
        self._may_be_empty = options.get("world_size", 1) > 1  # this rank's share; not the whole set
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
        try:
            for batch in self._stream:
                yield batch.data
                if batch.epoch_end:
                    break
        except NoBatchError:
            if not self._may_be_empty:
                raise
        if not self._keep_workers:
            self.close()

    def close(self) -> None:
        """End the workers; the next pass starts new ones."""
        self._stream.close()


def refuse_cuts(*, shuffle: bool | None, drop_last: bool, path: str) -> None:
    """Raise ConfigError for options with which a validation would not see every sample once, in order."""
    if shuffle:
        raise ConfigError(f"{path}.shuffle: found True, expected False: a validation reads the data in order")
    if drop_last:
        raise ConfigError(f"{path}.drop_last: found True, expected False: a validation reads every sample once")


def _users_sampler(sampler: Any, dataset: Any, *, seed: int, path: str) -> Any:
    """Return the user's sampler, or None if the built-in order is meant."""
    if sampler is None:
        return None
    made = sampler_maker(sampler, dataset, seed=seed, path=path)()
    if not is_built_in_order(made):
        try:
            len(made)
        except TypeError:
            raise ConfigError(f"{path}: {type(made).__name__} has no length, expected a sampler with __len__") from None
        if dist.model_parallel() > 1:
            raise ConfigError(
                f"{path}: {type(made).__name__} divides samples among ranks itself, but with tensor parallelism some "
                "ranks must read the same; leave the sampler out, or use 'DefaultSampler'"
            )
        return made
    # In MMEngine too a name without shuffle=False means shuffling; only an explicit shuffle=True is refused.
    if made.shuffle and not (isinstance(sampler, dict) and "shuffle" not in sampler):
        raise ConfigError(f"{path}.shuffle: found True, expected False: a validation reads the data in order")
    return None
