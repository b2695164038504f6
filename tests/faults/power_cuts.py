"""What a power cut may leave of a trace of file operations: a model of a disk that has written only what was synced.

A file's data is on the disk once the file is fsynced, and an entry of a directory (a new, renamed or deleted name) once
the directory is. Whatever else was done may or may not have reached the disk, each file and directory by itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mmtrain.checkpoint import LocalFiles

DATA = ("absent", "zero", "cut", "whole")  # what is on the disk of data that was not synced
ENTRIES = ("kept", "lost", "lost in the root", "lost below the root")  # changes of directories that were not synced
SYNCS = {"fsync", "sync_file", "sync_directory"}


class Recorder(LocalFiles):
    """Does what it is asked and keeps a trace of it: (call, path, a second path or data). Paths are under ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.trace: list[tuple] = []
        self._open: dict[int, Path] = {}

    def note(self, call, path="", other=None):
        self.trace.append((call, self._short(path), other))

    def mkdir(self, path):
        super().mkdir(path)
        self.note("mkdir", path)

    def open(self, path):
        handle = super().open(path)
        self._open[handle] = path
        self.note("open", path)
        return handle

    def write(self, handle, data):
        super().write(handle, data)
        self.note("write", self._open[handle], bytes(data))

    def fsync(self, handle):  # not really, to be quick
        self.note("fsync", self._open[handle])

    def fsync_path(self, path):
        self.note("sync_directory" if path.is_dir() else "sync_file", path)

    def close(self, handle):
        del self._open[handle]
        super().close(handle)

    def rename(self, old, new):
        super().rename(old, new)
        self.note("rename", old, self._short(new))

    def unlink(self, path):
        super().unlink(path)
        self.note("unlink", path)

    def rmdir(self, path):
        super().rmdir(path)
        self.note("rmdir", path)

    def _short(self, path) -> tuple[str, ...]:
        return Path(path).relative_to(self.root).parts if path else ()


@dataclass
class File:
    data: bytes = b""
    synced: bytes = b""

    def left(self, kind: str) -> bytes:
        fresh = self.data[len(self.synced) :]  # files are only ever appended to
        return self.synced + {
            "absent": b"", "zero": bytes(len(fresh)), "cut": fresh[: len(fresh) // 2], "whole": fresh,
        }[kind]  # fmt: skip


@dataclass
class Directory:
    entries: dict[str, "File | Directory"] = field(default_factory=dict)
    synced: dict[str, "File | Directory"] = field(default_factory=dict)

    def at(self, path: tuple[str, ...]) -> "File | Directory":
        return self.entries[path[0]].at(path[1:]) if len(path) > 1 else self.entries[path[0]] if path else self


class Disk:
    """The state after a prefix of a trace. ``ignored`` are calls that do nothing, as if the program did not make them."""

    def __init__(self, ignored=frozenset()) -> None:
        self.top = Directory()
        self.ignored = ignored

    def apply(self, call: str, path: tuple[str, ...], other) -> None:
        if call in self.ignored:
            return
        parent = self.top.at(path[:-1]) if path else None
        if call in ("mkdir", "open"):
            parent.entries[path[-1]] = Directory() if call == "mkdir" else File()
        elif call == "write":
            parent.entries[path[-1]].data += other
        elif call in ("fsync", "sync_file"):
            file = parent.entries[path[-1]]
            file.synced = file.data
        elif call == "sync_directory":
            directory = self.top.at(path)
            directory.synced = dict(directory.entries)
        elif call == "rename":
            moved = parent.entries.pop(path[-1])
            self.top.at(other[:-1]).entries[other[-1]] = moved
        elif call in ("unlink", "rmdir"):
            del parent.entries[path[-1]]

    def states(self, kinds=DATA, entries=ENTRIES) -> Iterator[tuple[str, dict]]:
        """What may be on the disk now: each different tree once, as nested dicts, with its description."""
        seen = []
        for kept in entries:
            for kind in kinds:
                tree = _tree(self.top, kind, kept, depth=0)
                if tree not in seen:
                    seen.append(tree)
                    yield f"unsynced data {kind}, unsynced entries {kept}", tree


def _tree(directory: Directory, kind: str, kept: str, *, depth: int) -> dict:
    lost = {"kept": False, "lost": True, "lost in the root": depth <= 1, "lost below the root": depth > 1}[kept]
    entries = directory.synced if lost else directory.entries
    return {
        name: inode.left(kind) if isinstance(inode, File) else _tree(inode, kind, kept, depth=depth + 1)
        for name, inode in entries.items()
    }


def write_tree(folder: Path, tree: dict) -> None:
    folder.mkdir()
    for name, content in tree.items():
        if isinstance(content, dict):
            write_tree(folder / name, content)
        else:
            (folder / name).write_bytes(content)


def read_tree(folder: Path) -> dict:
    return {path.name: read_tree(path) if path.is_dir() else path.read_bytes() for path in folder.iterdir()}
