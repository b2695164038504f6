"""The lock of a work directory: one run writes there at a time.

It is a POSIX record lock (fcntl(2), ``F_SETLK``) on ``<work_dir>/.lock``. Such a lock belongs to the process, not to
the open file: a forked data worker does not inherit it, so a worker that outlives its killed parent keeps nothing
locked, and the system releases it when the process ends, however that happens. The text in the file only says who
holds it. Where the file system has no locks, the text decides: a holder that is alive on this machine has the lock.

Why not the ``filelock`` package: its lock is flock(2), which belongs to the open file, so forked processes inherit it,
and after a run is killed a worker that is still alive keeps the work directory locked. Tested: release 3.18 with a
worker that `os.fork` makes; release 4.2 closes the file in those, but not in a process that a C library forks. Nor does
it say who holds the lock, and where the file system has no locks (ENOLCK, ENOTSUP) it fails.
"""

import contextlib
import errno
import json
import os
import time
from pathlib import Path
from typing import Any

from mmtrain.checkpoint import process_identity
from mmtrain.errors import RunError
from mmtrain.files import UnusableFileError, make_directories, open_private

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_held: set[str] = set()  # a process never conflicts with its own record locks, so it must remember them
_RETRY = 0.05


class WorkDirLock:
    """Taken with `acquire` or a ``with`` block, by one rank per disk; the end of the process releases it too."""

    def __init__(self, work_dir: Path | str) -> None:
        self.path = Path(work_dir) / LOCK
        self._handle: int | None = None
        self._key = ""

    @property
    def held(self) -> bool:
        return self._handle is not None

    def acquire(self, *, wait_seconds: float = 2.0) -> "WorkDirLock":
        """Take the lock; ``wait_seconds`` are for a holder that was just killed and is still being torn down.

        Raises RunError with host and process of the run that holds it, and where the lock is a link or has a second
        name: the text would be written into another file.
        """
        make_directories(self.path.parent.absolute())
        key = str(self.path.parent.resolve() / LOCK)
        # opening and closing the file a second time in one process would release the lock: check before touching it
        if key in _held:
            raise RunError(f"{self.path.parent} is already in use by a run in this process (pid {os.getpid()})")
        self._handle = self._take(
            wait_seconds, "is in use by {}; wait for that run, stop it, or use another work_dir for this one"
        )
        self._key = key
        _held.add(key)
        return self

    def renew(self) -> str:
        """Take the lock again if the directory was deleted or replaced since; returns a notice then, else "".

        Raises RunError where another run has taken it meanwhile: two runs must not write into one directory, and this
        one has lost what it had written there. Raises OSError where the directory cannot be read now.
        """
        if self._handle is None or _is_at(self._handle, self.path):
            return ""
        make_directories(self.path.parent.absolute())
        handle = self._take(
            0.0,
            "was deleted or replaced while this run used it, and is in use by {} now. This run ends, because two runs "
            "cannot write into one directory; start it again with another work_dir",
        )
        with contextlib.suppress(OSError):
            os.close(self._handle)
        self._handle = handle
        self._try(handle)  # where the file was the same after all, closing it has released the lock
        return f"{self.path.parent} was deleted or replaced while this run used it; it continues in a new one"

    def release(self) -> None:
        """Release the lock. The file stays: removing it would let two runs lock two files of one name."""
        if self._handle is None:
            return
        with contextlib.suppress(OSError):
            os.ftruncate(self._handle, 0)
        with contextlib.suppress(OSError):
            os.close(self._handle)
        self._handle = None
        _held.discard(self._key)

    def __enter__(self) -> "WorkDirLock":
        return self if self.held else self.acquire()

    def __exit__(self, *_: Any) -> None:
        self.release()

    def _take(self, wait_seconds: float, refusal: str) -> int:
        """Open the file and lock it. Raises RunError with ``refusal`` about the holder."""
        try:
            handle = open_private(self.path)
        except UnusableFileError as error:
            raise RunError(f"{self.path} cannot be used as the lock of this directory: {error}") from error
        deadline = time.monotonic() + wait_seconds
        try:
            while not self._try(handle):
                if time.monotonic() >= deadline:
                    raise RunError(f"{self.path.parent} {refusal.format(_who(_read(handle)))}")
                time.sleep(_RETRY)
            _write(handle)
        except BaseException:
            os.close(handle)
            raise
        return handle

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
            return not process_identity.is_other_alive(str(_read(handle).get("token", "")), unknown=True)
        return True


def _is_at(handle: int, path: Path) -> bool:
    """Whether the open file is the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(handle), path.lstat())
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        if error.errno == errno.ESTALE:  # deleted by another machine
            return False
        raise


def _who(holder: dict[str, Any]) -> str:
    who = f"process {holder['pid']} on {holder['host']}" if {"pid", "host"} <= holder.keys() else "another process"
    return who + (f", since {holder['since']}" if "since" in holder else "")


def _read(handle: int) -> dict[str, Any]:
    try:
        document = json.loads(os.pread(handle, 4096, 0))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _write(handle: int) -> None:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    text = json.dumps(
        {"host": process_identity.host(), "pid": os.getpid(), "since": since, "token": process_identity.new_token()}
    )
    os.ftruncate(handle, 0)
    os.pwrite(handle, text.encode(), 0)
