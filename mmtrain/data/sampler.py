"""Which samples an iteration reads: pure index arithmetic on (seed, epoch, offset), without state."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from mmtrain.data.permutation import EpochOrder, epoch_order
from mmtrain.errors import ConfigError
from mmtrain.progress import iterations_per_epoch
from mmtrain.registry import DATA_SAMPLERS


class BatchIndices(NamedTuple):
    """The samples that one iteration reads on this rank, and how far it moves the position.

    ``offset`` is the position of the iteration's first sample in epoch ``epoch``, counted over all ranks. ``indices``
    are this rank's; they may be empty in the last iteration of a validation. ``samples`` is the number of samples that
    all ranks consume together. ``weight`` is `types.Batch.weight`.
    """

    epoch: int
    offset: int
    indices: list[int]
    samples: int
    epoch_end: bool
    weight: float = 1.0


class IndexSource(Protocol):
    """The endless sequence of batch indices of a stream, from any position."""

    @property
    def samples(self) -> int:
        """Samples that all ranks together consume in one full epoch."""
        ...

    @property
    def iterations_per_epoch(self) -> int: ...

    def normalise(self, epoch: int, offset: int) -> tuple[int, int]:
        """Return the position of the next batch: the start of the next epoch if nothing is left of this one."""
        ...

    def iterations_left(self, epoch: int, offset: int) -> int:
        """Iterations from an offset to the end of its epoch."""

    def sizes_ahead(self, epoch: int, offset: int, count: int) -> list[int]:
        """Samples of each of the ``count`` iterations from a position on, over all ranks."""
        ...

    def batch_indices(self, epoch: int, offset: int) -> Iterator[BatchIndices]:
        """Yield the batches from this position on, epoch after epoch, without end."""
        ...

    @property
    def order(self) -> dict[str, Any]:
        """What the order of an epoch depends on, other than its number, as plain values for the ledger."""
        ...


def rank_slice(offset: int, count: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return the positions [start, stop) that one rank reads of a global batch of ``count`` samples at ``offset``."""
    each, extra = divmod(count, world_size)
    start = offset + rank * each + min(rank, extra)
    return start, start + each + (rank < extra)


def sizes_from(left: int, size: int, batch: int, count: int, *, drop_last: bool) -> list[int]:
    """Sizes of the next ``count`` batches of up to ``batch``, with ``left`` samples left of an epoch of ``size``."""
    if left >= count * batch:
        return [batch] * count
    sizes: list[int] = []
    while len(sizes) < count:
        if left < (batch if drop_last else 1):
            left = size
        sizes.append(min(batch, left))
        left -= sizes[-1]
    return sizes


def check_sizes(size: int, batch_size: Any, *, world_size: int, drop_last: bool, path: str) -> None:
    """Check that an epoch of ``size`` samples has at least one batch.

    Raises:
        ConfigError: the batch size is not a positive integer, the dataset is empty, or ``drop_last`` drops everything.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"{path}.batch_size: found {batch_size!r}, expected an integer of at least 1")
    if size < 1:
        raise ConfigError(
            f"{path}.dataset: the dataset is empty (its length is {size}), expected at least one sample; check its "
            "paths and filters"
        )
    if drop_last and size < batch_size * world_size:
        ranks = f" x {world_size} ranks" if world_size > 1 else ""
        raise ConfigError(
            f"{path}.batch_size: one iteration takes {batch_size * world_size} samples (batch_size {batch_size}{ranks})"
            f" but the dataset has {size}, and drop_last=True drops an incomplete batch, so no batch is left; use "
            f"batch_size={size // world_size or 1} or less, or drop_last=False"
        )


class PositionSampler:
    """Divides epochs of ``size`` samples into global batches, and each of these among the ranks.

    A global batch is ``order[offset : offset + batch_size * world_size]``, and rank r takes its r-th contiguous part,
    so the samples of an iteration do not depend on the number of ranks. The incomplete last batch is divided as evenly
    as possible (earlier ranks get one more). Nothing is padded or repeated. A rank without a sample reads the batch's
    first one with weight 0: it takes part in the iteration and adds nothing. ``drop_last`` drops the incomplete last
    batch. An epoch can be entered at any offset, also one that is not a multiple of the global batch, so a run whose
    batch size changed continues from its offset.

    Raises:
        ConfigError: see `check_sizes`.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool = True,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_sizes(size, batch_size, world_size=world_size, drop_last=drop_last, path="dataloader")
        self.size = size
        self.global_batch = batch_size * world_size
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.rank = rank
        self.world_size = world_size
        self._cached_order: tuple[int, EpochOrder] | None = None

    @property
    def samples(self) -> int:
        return self.size - self.size % self.global_batch if self.drop_last else self.size

    @property
    def iterations_per_epoch(self) -> int:
        return iterations_per_epoch(self.size, self.global_batch, drop_last=self.drop_last)

    @property
    def order(self) -> dict[str, Any]:
        return {"size": self.size, "seed": self.seed, "shuffle": self.shuffle, "drop_last": self.drop_last}

    def normalise(self, epoch: int, offset: int) -> tuple[int, int]:
        needed = self.global_batch if self.drop_last else 1
        return (epoch + 1, 0) if self.size - offset < needed else (epoch, offset)

    def iterations_left(self, epoch: int, offset: int) -> int:
        return iterations_per_epoch(self.size - offset, self.global_batch, drop_last=self.drop_last)

    def sizes_ahead(self, epoch: int, offset: int, count: int) -> list[int]:
        return sizes_from(self.size - offset, self.size, self.global_batch, count, drop_last=self.drop_last)

    def batch_indices(self, epoch: int, offset: int) -> Iterator[BatchIndices]:
        epoch, offset = self.normalise(epoch, offset)
        while True:
            count = min(self.global_batch, self.size - offset)
            start, stop = rank_slice(offset, count, self.rank, self.world_size)
            following = self.normalise(epoch, offset + count)
            weight = (stop - start) * self.world_size / count
            if start == stop:
                start, stop = offset, offset + 1
            indices = self._order(epoch).take(start, stop)
            yield BatchIndices(epoch, offset, indices, count, following[0] != epoch, weight)
            epoch, offset = following

    def _order(self, epoch: int) -> EpochOrder:
        if self._cached_order is None or self._cached_order[0] != epoch:
            self._cached_order = (epoch, epoch_order(self.size, self.seed, epoch, shuffle=self.shuffle))
        return self._cached_order[1]


@DATA_SAMPLERS.register_module()
class DefaultSampler:
    """MMEngine's name and arguments for the stream's built-in order; see `PositionSampler`.

    ``seed`` replaces the run's seed for the order only. ``round_up`` is accepted and has no effect: samples are never
    repeated to give all ranks the same number.
    """

    def __init__(
        self, dataset: Any = None, shuffle: bool = True, seed: int | None = None, round_up: bool = True
    ) -> None:
        self.shuffle = shuffle
        self.seed = seed


@DATA_SAMPLERS.register_module()
class InfiniteSampler:
    """MMEngine's name for the same endless stream as `DefaultSampler`. It has epochs and a position, too."""

    def __init__(self, dataset: Any = None, shuffle: bool = True, seed: int | None = None) -> None:
        self.shuffle = shuffle
        self.seed = seed
