"""Which samples an iteration reads: pure index arithmetic on (seed, epoch, offset), without state."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from mmtrain.data.permutation import Order, epoch_order
from mmtrain.errors import ConfigError
from mmtrain.progress import iterations_per_epoch
from mmtrain.registry import DATA_SAMPLERS


class Draw(NamedTuple):
    """What one iteration reads on this rank, and what it means for the position.

    ``offset`` is the first global sample of the iteration in pass ``epoch``; ``indices`` are this rank's and may be
    empty in the last iteration of a pass of a validation; ``samples`` is what all ranks consume together; ``weight`` is
    `types.Batch.weight`.
    """

    epoch: int
    offset: int
    indices: list[int]
    samples: int
    epoch_end: bool
    weight: float = 1.0


class IndexSource(Protocol):
    """What gives the draws of a stream from any position on, endlessly."""

    @property
    def samples(self) -> int:
        """Samples that all ranks together consume in one full pass."""
        ...

    @property
    def iterations_per_epoch(self) -> int: ...

    def normalise(self, epoch: int, offset: int) -> tuple[int, int]:
        """Return where the next draw really stands: the next pass's beginning when nothing is left of this one."""
        ...

    def iterations_left(self, epoch: int, offset: int) -> int:
        """Iterations from an offset to the end of its pass."""

    def draws(self, epoch: int, offset: int) -> Iterator[Draw]: ...

    @property
    def order(self) -> dict[str, Any]:
        """What the order of a pass is a function of, besides the pass, as plain values for the record."""
        ...


def share(offset: int, count: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return the positions [start, stop) of one rank in a global batch of ``count`` samples at ``offset``."""
    each, extra = divmod(count, world_size)
    start = offset + rank * each + min(rank, extra)
    return start, start + each + (rank < extra)


def check_sizes(size: int, batch_size: Any, *, world_size: int, drop_last: bool, path: str) -> None:
    """Check that a pass over ``size`` samples gives at least one batch.

    Raises:
        ConfigError: the batch size is no positive integer, the data set is empty, or ``drop_last`` drops everything.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"{path}.batch_size: found {batch_size!r}, expected an integer of at least 1")
    if size < 1:
        raise ConfigError(
            f"{path}.dataset: the data set is empty (its length is {size}), expected at least one sample; check the "
            "paths and filters that it reads"
        )
    if drop_last and size < batch_size * world_size:
        ranks = f" x {world_size} ranks" if world_size > 1 else ""
        raise ConfigError(
            f"{path}.batch_size: one iteration takes {batch_size * world_size} samples (batch_size {batch_size}{ranks})"
            f" but the data set has {size}, and drop_last=True drops an incomplete batch, so no batch is left; use "
            f"batch_size={size // world_size or 1} or less, or drop_last=False"
        )


class PositionSampler:
    """Cuts passes over ``size`` samples into global batches and gives this rank its share of each.

    Global batch k of a pass is ``order[offset : offset + batch_size * world_size]``, and rank r takes the r-th
    contiguous part, so the samples of an iteration do not depend on how many ranks share it. The incomplete last batch
    is shared as evenly as it goes (earlier ranks get one more); nothing is padded or repeated. A rank that is left
    without a sample reads the batch's first one, with weight 0: it takes part in the iteration and adds nothing.
    ``drop_last`` drops what is left when it is less than a full global batch. A pass can be entered at any offset, also
    one that is no multiple of the global batch: a changed batch size just starts there.

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
        self._held: tuple[int, Order] | None = None

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

    def draws(self, epoch: int, offset: int) -> Iterator[Draw]:
        """Give the draws from this position on, pass after pass, without end."""
        epoch, offset = self.normalise(epoch, offset)
        while True:
            count = min(self.global_batch, self.size - offset)
            start, stop = share(offset, count, self.rank, self.world_size)
            following = self.normalise(epoch, offset + count)
            weight = (stop - start) * self.world_size / count
            if start == stop:
                start, stop = offset, offset + 1
            indices = self._order(epoch).take(start, stop)
            yield Draw(epoch, offset, indices, count, following[0] != epoch, weight)
            epoch, offset = following

    def _order(self, epoch: int) -> Order:
        if self._held is None or self._held[0] != epoch:
            self._held = (epoch, epoch_order(self.size, self.seed, epoch, shuffle=self.shuffle))
        return self._held[1]


@DATA_SAMPLERS.register_module()
class DefaultSampler:
    """MMEngine's name and arguments for the stream's own order; see `PositionSampler`.

    ``seed`` replaces the run's seed for the order alone. ``round_up`` is accepted and has no effect: no sample is ever
    repeated to make ranks even.
    """

    def __init__(
        self, dataset: Any = None, shuffle: bool = True, seed: int | None = None, round_up: bool = True
    ) -> None:
        self.shuffle = shuffle
        self.seed = seed


@DATA_SAMPLERS.register_module()
class InfiniteSampler:
    """MMEngine's name for the same endless stream as `DefaultSampler`; it has passes and a position all the same."""

    def __init__(self, dataset: Any = None, shuffle: bool = True, seed: int | None = None) -> None:
        self.shuffle = shuffle
        self.seed = seed
