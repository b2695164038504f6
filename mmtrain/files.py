"""Files that are replaced all at once, and the hash of files: xxh3 with 128 bits (https://xxhash.com).

Calls that change the disk go through a small `Files` object where a test must be able to make any one of them fail.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import xxhash

from mmtrain import heartbeat

_BLOCK = 4 << 20


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


def write_new(path: Path, data: bytes, files: Files = _LOCAL) -> None:
    """Write one small file that must not exist yet, and fsync it."""
    handle = files.open(path)
    try:
        files.write(handle, memoryview(data))
        files.fsync(handle)
    finally:
        files.close(handle)


def hash_bytes(data: bytes | memoryview) -> str:
    """The xxh3-128 of ``data`` as 32 lower-case hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


def hash_file(path: Path) -> str:
    """The xxh3-128 of a file's contents, as `hash_bytes` gives it; about 15 GB/s from the page cache."""
    hasher = xxhash.xxh3_128()
    buffer = memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            hasher.update(buffer[:count])
            heartbeat.beat()
    return hasher.hexdigest()
