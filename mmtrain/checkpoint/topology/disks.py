"""Which ranks see the same directory: found by trying, so nobody has to say whether a work dir is shared.

A rank of each host writes a file with a random name into the directory, and every rank looks which of them it sees. The
host's name only saves rounds: a rank that sees none of the files writes one of its own in the next round.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mmtrain import dist
from mmtrain.checkpoint import owner
from mmtrain.errors import CheckpointError, MMTrainError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Disks:
    """For each rank its disk, named by the disk's leader: the lowest rank that sees the same directory."""

    leaders: tuple[int, ...]
    hosts: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = [f" on {host}" for host in self.hosts] or [""] * len(self.leaders)
        return "; ".join(f"rank {', '.join(map(str, ranks))}{where[ranks[0]]}" for ranks in self.all())

    @classmethod
    def shared(cls, size: int) -> "Disks":
        """One directory that all ranks see."""
        return cls((0,) * size)

    @property
    def one(self) -> bool:
        """Whether all ranks see the same directory."""
        return not any(self.leaders)

    def all(self) -> list[list[int]]:
        """The ranks of each disk, disks in the order of their leaders."""
        return [self.ranks_with(leader) for leader in sorted(set(self.leaders))]

    def ranks_with(self, rank: int) -> list[int]:
        """The ranks that see the directory of ``rank``."""
        return [other for other, leader in enumerate(self.leaders) if leader == self.leaders[rank]]

    def told(self, rank: int) -> str:
        """A disk in words: by its leader and host."""
        leader = self.leaders[rank]
        return f"the disk of rank {leader}" + (f" ({self.hosts[leader]})" if self.hosts else "")

    def on_leaders(self, function: Callable[[], T], *, gather: Callable[[Any], list[Any]] = dist.gather_objects) -> T:
        """Each disk's leader runs ``function``; everyone gets its own leader's result, or the first one's exception."""
        rank = dist.rank()
        outcome: tuple[Any, Exception | None] = (None, None)
        if self.leaders[rank] == rank:
            try:
                outcome = (function(), None)
            except Exception as error:
                outcome = (None, error)
        outcomes = gather(outcome)
        for other, (_, failure) in enumerate(outcomes):
            if failure is not None:
                raise self.named(other, failure)
        return outcomes[self.leaders[rank]][0]

    def named(self, rank: int, failure: Exception) -> Exception:
        """``failure``, met by ``rank`` alone, with the rank in its sentence."""
        if self.one or not isinstance(failure, (MMTrainError, OSError)):
            return failure
        where = f"rank {rank} ({self.hosts[rank]})" if self.hosts else f"rank {rank}"
        kind = type(failure) if isinstance(failure, MMTrainError) else CheckpointError
        return kind(f"{where}: {failure}")


def find_disks(directory: Path) -> Disks:
    """Find out which ranks see the same ``directory``, which is made where it is missing; a collective.

    Raises OSError, on every rank, where one cannot write there.
    """
    rank, size = dist.rank(), dist.world_size()
    if size == 1:
        return Disks.shared(1)
    hosts = dist.gather_objects(owner.host())
    leaders: dict[int, int] = {}
    while len(leaders) < size:
        waiting = [other for other in range(size) if other not in leaders]
        writers = {hosts[other]: other for other in reversed(waiting)}.values()
        leaders |= _look(directory, writes=rank in writers, waiting=waiting)
    return Disks(tuple(leaders[other] for other in range(size)), tuple(hosts))


def _look(directory: Path, *, writes: bool, waiting: Sequence[int]) -> dict[int, int]:
    """One round: the leader of each rank that saw a file of this round, by rank."""
    token, failure = None, None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if writes:
            # the name of a save's leftover: whatever a kill leaves here is cleared away with those
            token = f".disk.tmp-{owner.new_token()}"
            (directory / token).touch(exist_ok=False)
    except OSError as error:
        failure = error
    written = dist.gather_objects((token, failure))
    seen = [other for other, (name, _) in enumerate(written) if name and (directory / name).exists()]
    everyone = dist.gather_objects(seen)  # nobody looks any more: the file may go
    if token is not None:
        with contextlib.suppress(OSError):
            (directory / token).unlink()
    for other, (_, problem) in enumerate(written):
        if problem is not None:
            raise OSError(problem.errno, f"{problem.strerror} (rank {other})", str(directory)) from problem
    return _components({other: everyone[other] for other in waiting if everyone[other]})


def _components(seen: dict[int, list[int]]) -> dict[int, int]:
    """The lowest rank with which each rank shares a disk. Whoever sees the files of two shows that these share one."""
    lowest = {rank: min(rank, *files) for rank, files in seen.items()}
    while True:
        better = dict(lowest)
        for rank, files in seen.items():
            together = {rank, *files} & lowest.keys()
            least = min(better[other] for other in together)
            better |= dict.fromkeys(together, least)
        if better == lowest:
            return lowest
        lowest = better
