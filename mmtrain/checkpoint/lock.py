"""The lock of a work directory: one run writes there at a time.

It is a POSIX record lock (fcntl(2), ``F_SETLK``) on ``<work_dir>/.lock``. Such a lock belongs to the process, not to
the open file: a forked data worker does not inherit it, so a worker that outlives its killed parent keeps nothing
locked, and the system drops it at the very end of the process, however that comes. The text in the file only says who
holds it. Where the file system has no locks, the text is what counts: a holder that is alive on this machine is
believed.
"""

import contextlib
import errno
import json
import os
import time
from pathlib import Path
from typing import Any

from mmtrain.checkpoint import owner
from mmtrain.errors import RunError

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_held: set[str] = set()  # a process never conflicts with its own record locks, so it has to remember them
_RETRY = 0.05


class WorkDirLock:
    """Taken with `acquire` or a ``with`` block, by rank 0 alone; `release` or the end of the process gives it back."""

    def __init__(self, work_dir: Path | str) -> None:
        self.path = Path(work_dir) / LOCK
        self._handle: int | None = None

    @property
    def held(self) -> bool:
        return self._handle is not None

    def acquire(self, *, wait_seconds: float = 2.0) -> "WorkDirLock":
        """Take the lock; ``wait_seconds`` are for a holder that has just been killed and is still being torn down.

        Raises RunError naming host and process of the run that holds it.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        key = str(self.path.resolve())
        # opening and closing the file a second time in one process would drop the lock: ask before touching it
        if key in _held:
            raise RunError(f"{self.path.parent} is already being written by a run in this process (pid {os.getpid()})")
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        deadline = time.monotonic() + wait_seconds
        try:
            while not self._try(handle):
                if time.monotonic() >= deadline:
                    raise RunError(self._refusal(_read(handle)))
                time.sleep(_RETRY)
            _write(handle)
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle
        _held.add(key)
        return self

    def release(self) -> None:
        """Give the lock back. The file stays: removing it would let two runs lock two files of one name."""
        if self._handle is None:
            return
        with contextlib.suppress(OSError):
            os.ftruncate(self._handle, 0)
        os.close(self._handle)
        self._handle = None
        _held.discard(str(self.path.resolve()))

    def __enter__(self) -> "WorkDirLock":
        return self if self.held else self.acquire()

    def __exit__(self, *_: Any) -> None:
        self.release()

    def _try(self, handle: int) -> bool:
        try:
            if fcntl is None:
                raise OSError(errno.ENOTSUP, "no record locks on this system")
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
                raise
            return not owner.is_other_alive(str(_read(handle).get("token", "")), unknown=True)
        return True

    def _refusal(self, holder: dict[str, Any]) -> str:
        who = f"process {holder['pid']} on {holder['host']}" if {"pid", "host"} <= holder.keys() else "another process"
        since = f", since {holder['since']}" if "since" in holder else ""
        return (
            f"{self.path.parent} is being written by {who}{since}; "
            "wait for that run, stop it, or give this one another work_dir"
        )


def _read(handle: int) -> dict[str, Any]:
    try:
        document = json.loads(os.pread(handle, 4096, 0))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _write(handle: int) -> None:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    text = json.dumps({"host": owner.host(), "pid": os.getpid(), "since": since, "token": owner.new_token()})
    os.ftruncate(handle, 0)
    os.pwrite(handle, text.encode(), 0)
