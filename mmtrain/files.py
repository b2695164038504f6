"""Files that are replaced all at once, safe ways to open files of unknown origin, and the hash of files.

Calls that change the disk go through a small `Files` object where a test must be able to make any one of them fail. The
hash is xxh3 with 128 bits (https://xxhash.com).
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import xxhash

from mmtrain import heartbeat

_BLOCK = 4 << 20
# O_NONBLOCK: opening a pipe does not wait for its other end; regular files do not know the flag
_SAFE = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
_KINDS = {
    stat.S_ISDIR: "a directory", stat.S_ISFIFO: "a named pipe", stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device", stat.S_ISBLK: "a device",
}  # fmt: skip


class Files(Protocol):
    """Every call by which a save changes the disk. `LocalFiles` is the real one; tests pass one that fails."""

    def mkdir(self, path: Path) -> None: ...
    def open(self, path: Path) -> int: ...
    def write(self, handle: int, data: memoryview) -> None: ...
    def fsync(self, handle: int) -> None: ...
    def close(self, handle: int) -> None: ...
    def fsync_path(self, path: Path) -> None: ...
    def rename(self, old: Path, new: Path) -> None: ...
    def unlink(self, path: Path) -> None: ...
    def rmdir(self, path: Path) -> None: ...


class LocalFiles:
    """A mounted file system."""

    def mkdir(self, path: Path) -> None:
        path.mkdir()

    def open(self, path: Path) -> int:
        """Create a file that must not exist yet, for writing."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)

    def write(self, handle: int, data: memoryview) -> None:
        """Write all of ``data``; a single system call may take less."""
        while data.nbytes:
            data = data[os.write(handle, data) :]

    def fsync(self, handle: int) -> None:
        os.fsync(handle)

    def close(self, handle: int) -> None:
        os.close(handle)

    def fsync_path(self, path: Path) -> None:
        """Bring a file that is closed, or the entries of a directory, to the disk."""
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            # some network and FUSE file systems have no fsync for directories; there is nothing better to call
            if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
                raise
        finally:
            os.close(handle)

    def rename(self, old: Path, new: Path) -> None:
        old.replace(new)

    def unlink(self, path: Path) -> None:
        path.unlink()

    def rmdir(self, path: Path) -> None:
        path.rmdir()


_LOCAL = LocalFiles()


@contextmanager
def replacing(path: Path, *, aside: Path | None = None, durable: bool = True, files: Files = _LOCAL) -> Iterator[Path]:
    """Yield a path beside ``path``; what the block writes there replaces ``path`` by one rename.

    A reader finds the old file or the new one, never a part of one. With ``durable`` the file is on the disk before the
    rename, and the rename is on the disk when this returns. ``aside`` is the path to write to, on the same file system
    (``.<name>.tmp`` by default). When the block or the rename fails, that file is removed and ``path`` is unchanged.
    """
    aside = aside or path.with_name(f".{path.name}.tmp")
    if os.path.lexists(aside):  # left by a kill; and a link there would lead the writing elsewhere
        files.unlink(aside)
    try:
        yield aside
        if durable and aside.is_file():
            files.fsync_path(aside)
        files.rename(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            files.unlink(aside)
        raise
    if durable:
        files.fsync_path(path.parent)


def make_directories(path: Path, files: Files = _LOCAL) -> None:
    """Make ``path`` and its missing parents, durably: a directory that a power cut removes takes its contents along."""
    for directory in reversed([path, *path.parents]):
        if directory.exists():
            continue
        with contextlib.suppress(FileExistsError):
            files.mkdir(directory)
        with contextlib.suppress(PermissionError):  # a directory that may be written but not read
            files.fsync_path(directory.parent)


def write_new(path: Path, data: bytes, files: Files = _LOCAL) -> None:
    """Write one small file that must not exist yet, and fsync it."""
    handle = files.open(path)
    try:
        files.write(handle, memoryview(data))
        files.fsync(handle)
    finally:
        files.close(handle)


class UnusableFileError(OSError):
    """A file is not of the kind or size that can be read or written here; ``str()`` says what it is."""

    def __str__(self) -> str:
        return str(self.strerror)


def check_regular(status: os.stat_result, path: Path) -> None:
    """Raise UnusableFileError, which says what it is, for anything but a regular file."""
    kind = next((name for test, name in _KINDS.items() if test(status.st_mode)), None)
    if kind is not None or not stat.S_ISREG(status.st_mode):
        raise UnusableFileError(errno.EINVAL, f"it is {kind or 'not a file'}, expected a file", str(path))


def open_regular(path: Path) -> int:
    """Open a file for reading, and return its handle. Raises UnusableFileError for anything but a regular file.

    A pipe would block the open, and a device may never end. A link is followed: what it leads to must be regular.
    """
    check_regular(path.stat(), path)
    handle = os.open(path, os.O_RDONLY | _SAFE)
    try:
        check_regular(os.fstat(handle), path)
    except BaseException:
        os.close(handle)
        raise
    return handle


def read_bounded(path: Path, limit: int) -> bytes:
    """Read a whole regular file. Raises UnusableFileError if it is not one, or has more than ``limit`` bytes."""
    with open(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise UnusableFileError(errno.EFBIG, f"it has {size} bytes, expected at most {limit}", str(path))
        return file.read(size)


def open_private(path: Path) -> int:
    """Open a small file for reading and writing, made if it is missing, and return its handle; nothing is truncated.

    Raises UnusableFileError for a link, for a file that has a second name (a hard link), and for anything but a regular
    file: what is written there would end up in a file of someone else.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | _SAFE, 0o666)
    except OSError as error:
        if path.is_symlink():
            raise UnusableFileError(errno.ELOOP, "it is a link, expected a file; delete it", str(path)) from error
        raise
    try:
        status = os.fstat(handle)
        check_regular(status, path)
        if status.st_nlink > 1:
            raise UnusableFileError(errno.EMLINK, "it has a second name (a hard link); delete this one", str(path))
    except BaseException:
        os.close(handle)
        raise
    return handle


def hash_bytes(data: bytes | memoryview) -> str:
    """The xxh3-128 of ``data`` as 32 lower-case hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


def hash_file(path: Path) -> str:
    """The xxh3-128 of a regular file's contents, as `hash_bytes` gives it; about 15 GB/s from the page cache."""
    hasher = xxhash.xxh3_128()
    buffer = memoryview(bytearray(_BLOCK))
    with open(open_regular(path), "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            hasher.update(buffer[:count])
            heartbeat.beat()
    return hasher.hexdigest()
