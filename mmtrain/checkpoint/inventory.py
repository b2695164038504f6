"""The checkpoints of a directory as retention needs them at every save, each read once.

A run may have thousands of checkpoints, and reading all of their manifests at each save would make a run's cost grow
with the square of its length. What was read stays valid while the directory of that name is the same (its inode): a
checkpoint appears by a rename and does not change. What is about to be deleted, and what is kept in its place, is
looked at again, so that a checkpoint which another process damaged or took away does not count.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from mmtrain.checkpoint import discover
from mmtrain.checkpoint.retention import Entry, Retention, RetirePolicy, to_delete

MOST_CONFIRMED = 8  # of those kept: with max_keep_ckpts=1000 a save does not look at a thousand
ROUNDS = 10  # decisions at one save, while another process changes the directory; the next save tries again


class Inventory:
    """The complete checkpoints in ``root``; used by one thread at a time."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[str, tuple[int, Entry]] = {}  # by name: the directory's inode, and what was read in it

    def entries(self) -> list[Entry]:
        """The same as `discover.scan`, in ascending order; only what was not there before is read.

        Raises OSError where the directory cannot be listed; one that is missing has none.
        """
        known: dict[str, tuple[int, Entry]] = {}
        for name, inode in _directories(self._root):
            before = self._known.get(name)
            entry = before[1] if before is not None and before[0] == inode else self._read(name)
            if entry is not None:
                known[name] = (inode, entry)
        self._known = known
        return sorted((entry for _, entry in known.values()), key=discover.age)

    def confirm(self, names: Iterable[str]) -> bool:
        """Read these again; return whether all are as they were. What is not is forgotten, and read by `entries`."""
        changed = [name for name in names if name not in self._known or self._read(name) != self._known[name][1]]
        for name in changed:
            self._known.pop(name, None)
        return not changed

    def names_to_delete(self, retire: RetirePolicy) -> list[str]:
        """What ``retire`` deletes of the checkpoints that are here now."""
        for _ in range(ROUNDS):
            entries = self.entries()
            names = to_delete(entries, retire.keep, retire.protected)
            if self.confirm(decisive(entries, names, retire.keep)):
                return names
        return []

    def _read(self, name: str) -> Entry | None:
        path = self._root / name
        if not discover.is_candidate(path):
            return None
        manifest, faults = discover.inspect(path, verify="size")
        return None if manifest is None or faults else discover.entry_of(path, manifest)


def decisive(entries: Iterable[Entry], doomed: Iterable[str], policy: Retention) -> list[str]:
    """The names that a deletion rests on: what is deleted, and some of the newest that are kept in its place."""
    gone = set(doomed)
    if not gone:
        return []
    kept = [entry.name for entry in entries if entry.name not in gone]
    count = max(policy.max_keep_ckpts, 0) + policy.keep_temporary + 1
    return [*gone, *kept[-min(count, MOST_CONFIRMED) :]]


def _directories(root: Path) -> list[tuple[str, int]]:
    """Name and inode of each directory that may be a checkpoint; no call per entry where it is a directory itself."""
    try:
        with os.scandir(root) as found:
            return [(one.name, one.inode()) for one in found if not one.name.startswith(".") and one.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
