"""A directory on which every system call fails for a while, as on a network disk that went away or a shut-down XFS."""

import builtins
import io
import os
from pathlib import Path

BY_PATH = ("open", "stat", "lstat", "scandir", "listdir", "mkdir", "rename", "replace", "unlink", "rmdir", "truncate")
BY_HANDLE = ("write", "fsync", "fstat", "ftruncate")


class GoneDisk:
    """Replaces Python's own calls. While ``code`` is not 0, those under ``root`` raise OSError with it.

    ``calls`` counts the calls that failed.
    """

    def __init__(self, root: Path, monkeypatch) -> None:
        self.root, self.code, self.calls = str(root.absolute()), 0, 0
        for name in BY_PATH:
            monkeypatch.setattr(os, name, self._by_path(getattr(os, name)))
        for name in BY_HANDLE:
            monkeypatch.setattr(os, name, self._by_handle(getattr(os, name)))
        opened = self._by_path(io.open)
        monkeypatch.setattr(io, "open", opened)
        monkeypatch.setattr(builtins, "open", opened)

    def _by_path(self, real):
        def call(path=".", *args, **kwargs):
            if self.code and not isinstance(path, int):
                self._check(str(Path(os.fsdecode(path)).absolute()))
            return real(path, *args, **kwargs)

        return call

    def _by_handle(self, real):
        def call(handle, *args, **kwargs):
            if self.code:
                self._check(str(Path(f"/proc/self/fd/{handle}").readlink()))
            return real(handle, *args, **kwargs)

        return call

    def _check(self, path: str) -> None:
        if path == self.root or path.startswith(self.root + os.sep):
            self.calls += 1
            raise OSError(self.code, os.strerror(self.code), path)
