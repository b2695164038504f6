"""Finds out which ranks see the same directory by trying, so that no one has to say whether a work dir is shared.

One rank of each host writes a file with a random name into the directory, and every rank looks for these files. Host
names only save rounds: a rank that sees none of the files writes one itself in the next round.
"""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmtrain import dist
from mmtrain.checkpoint import process_identity
from mmtrain.checkpoint.topology.base import Topology
from mmtrain.checkpoint.topology.disks import Disks
from mmtrain.checkpoint.topology.divided import DividedDisks
from mmtrain.checkpoint.topology.shared import SharedDisk
from mmtrain.files import make_directories


def find_topology(directory: Path) -> Topology:
    """Find out which ranks see the same ``directory``, which is made if it is missing; a collective.

    Raises OSError, on every rank, if one cannot write there.
    """
    disks = find_disks(directory)
    return SharedDisk() if disks.is_shared else DividedDisks(disks)


def find_disks(directory: Path) -> Disks:
    """As `find_topology`, as a value."""
    rank = dist.rank()
    size = dist.world_size()
    if size == 1:
        return Disks.shared(1)
    hosts = dist.gather_objects(process_identity.host())
    leaders: dict[int, int] = {}
    while len(leaders) < size:
        waiting = [other for other in range(size) if other not in leaders]
        writers = {hosts[other]: other for other in reversed(waiting)}.values()
        leaders |= _one_round(directory, writes=rank in writers, waiting=waiting)
    return Disks(tuple(leaders[other] for other in range(size)), tuple(hosts))


def _one_round(directory: Path, *, writes: bool, waiting: Sequence[int]) -> dict[int, int]:
    """The leader of each rank that saw a file of this round, by rank."""
    token = failure = None
    try:
        make_directories(directory.absolute())
        if writes:
            # the name of a save's leftover: what a kill leaves here is cleared away with those
            token = f".disk.tmp-{process_identity.new_token()}"
            (directory / token).touch(exist_ok=False)
    except OSError as error:
        failure = error
    written = dist.gather_objects((token, failure))
    seen = [other for other, (name, _) in enumerate(written) if name and (directory / name).exists()]
    seen_by_rank = dist.gather_objects(seen)  # all ranks have looked: the file may go
    if token is not None:
        with contextlib.suppress(OSError):
            (directory / token).unlink()
    for other, (_, problem) in enumerate(written):
        if problem is not None:
            raise OSError(problem.errno, f"{problem.strerror} (rank {other})", str(directory)) from problem
    return leaders_by_rank({other: seen_by_rank[other] for other in waiting if seen_by_rank[other]})


def leaders_by_rank(seen: Mapping[int, Sequence[int]]) -> dict[int, int]:
    """The lowest rank with which each rank shares a disk.

    ``seen`` has, for each rank, the ranks whose files it sees. A rank that sees the files of two shows that these share
    a disk.
    """
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
