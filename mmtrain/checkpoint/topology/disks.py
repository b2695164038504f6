"""Which ranks see the same directory, as a value."""

from dataclasses import dataclass

from mmtrain.errors import CheckpointError, MMTrainError


@dataclass(frozen=True, slots=True)
class Disks:
    """For each rank the leader of its disk: the lowest rank that sees the same directory. ``hosts`` has host names."""

    leaders: tuple[int, ...]
    hosts: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = [f" on {host}" for host in self.hosts] or [""] * len(self.leaders)
        return "; ".join(f"rank {', '.join(map(str, ranks))}{where[ranks[0]]}" for ranks in self.groups())

    @classmethod
    def shared(cls, size: int) -> "Disks":
        """One directory that all ranks see."""
        return cls((0,) * size)

    @property
    def is_shared(self) -> bool:
        """Whether all ranks see the same directory."""
        return not any(self.leaders)

    def groups(self) -> list[list[int]]:
        """The ranks of each disk, disks in the order of their leaders."""
        return [self.ranks_with(leader) for leader in sorted(set(self.leaders))]

    def ranks_with(self, rank: int) -> list[int]:
        """The ranks that see the directory of ``rank``, ascending; the first is their leader."""
        return [other for other, leader in enumerate(self.leaders) if leader == self.leaders[rank]]

    def describe(self, rank: int) -> str:
        """The disk of ``rank`` in words: by its leader and host."""
        leader = self.leaders[rank]
        return f"the disk of rank {leader}" + (f" ({self.hosts[leader]})" if self.hosts else "")

    def with_rank(self, rank: int, failure: Exception) -> Exception:
        """``failure``, which happened on ``rank`` alone, with the rank in its message."""
        if self.is_shared or not isinstance(failure, (MMTrainError, OSError)):
            return failure
        where = f"rank {rank} ({self.hosts[rank]})" if self.hosts else f"rank {rank}"
        kind = type(failure) if isinstance(failure, MMTrainError) else CheckpointError
        return kind(f"{where}: {failure}")
