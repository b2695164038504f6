"""A file system that fails, or dies, at the k-th call that changes the disk."""

import os
import threading
from pathlib import Path

from mmtrain.checkpoint import LocalFiles


class Crash(BaseException):
    """The process ended here: no cleanup that follows has any effect."""


class FaultyFiles(LocalFiles):
    """``mode`` says what happens at call ``at``.

    ``count``: nothing ever fails; ``once``: it raises; ``from``: it and all later ones raise; ``crash``: nothing has
    any effect from then on; ``power``: the same, and files that were never fsynced lose their second half; ``kill``:
    SIGKILL.

    A write that fails has written half of its bytes. Nothing is really fsynced, to be quick.
    """

    def __init__(self, mode: str = "count", at: int = 0, error: int = 0) -> None:
        self.mode, self.at, self.error = mode, at, error
        self.calls: list[str] = []
        self._dirty: dict[int, Path] = {}
        self._unsynced: set[Path] = set()
        self._lock = threading.Lock()
        self.dead = False

    def _fails(self, call: str) -> bool:
        with self._lock:
            self.calls.append(call)
            return self.dead or len(self.calls) == self.at or (self.mode == "from" and 0 < self.at <= len(self.calls))

    def _fail(self, path: Path) -> None:
        if self.mode in ("once", "from"):
            raise OSError(self.error, os.strerror(self.error), str(path))
        if self.mode == "kill":
            os.kill(os.getpid(), 9)
        if self.mode == "power" and not self.dead:
            for unsynced in self._unsynced:
                if unsynced.exists():
                    os.truncate(unsynced, unsynced.stat().st_size // 2)
        self.dead = True
        raise Crash

    def mkdir(self, path):
        if self._fails("mkdir"):
            self._fail(path)
        super().mkdir(path)

    def open(self, path):
        if self._fails("open"):
            self._fail(path)
        handle = super().open(path)
        self._dirty[handle] = path
        return handle

    def write(self, handle, data):
        self._unsynced.add(self._dirty[handle])
        if self._fails("write"):
            if not self.dead:
                super().write(handle, data[: data.nbytes // 2])
            self._fail(self._dirty[handle])
        super().write(handle, data)

    def fsync(self, handle):
        if self._fails("fsync"):
            self._fail(self._dirty[handle])
        self._unsynced.discard(self._dirty[handle])

    def close(self, handle):
        path = self._dirty.pop(handle)  # first: another thread may be given the same number as soon as it is free
        super().close(handle)
        if self._fails("close"):
            self._fail(path)

    def fsync_path(self, path):
        if self._fails("fsync_path"):
            self._fail(path)

    def rename(self, old, new):
        if self._fails("rename"):
            self._fail(old)
        super().rename(old, new)

    def unlink(self, path):
        if self._fails("unlink"):
            self._fail(path)
        super().unlink(path)

    def rmdir(self, path):
        if self._fails("rmdir"):
            self._fail(path)
        super().rmdir(path)
