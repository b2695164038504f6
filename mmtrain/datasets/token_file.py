"""Converts text files to one file of tokens, once; later starts map it into memory.

``<cache_dir>/<name>-<key>-<split>.bin`` has only the tokens, the ``.json`` next to it their type, number and
hash. The key is made of paths, sizes and times of the files and of the tokenizer, so a change of any makes a new file.
The ``.json`` is written last: without it, or when it does not fit the ``.bin``, the tokens are made again.
"""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash

from mmtrain.datasets.sources import TextFiles
from mmtrain.datasets.tokenizers import encode_file, token_dtype, tokenizer_fingerprint
from mmtrain.errors import ConfigError, RunError
from mmtrain.files import UnusableFileError, hash_file, open_private, open_regular, read_bounded, replacing

_FORMAT = 1
_DESCRIPTION_LIMIT = 1 << 16  # bytes of the .json
_DTYPES = ("uint8", "uint16", "uint32", "uint64")
_HASHED_BYTES = 1 << 30  # a file beyond this is trusted by its size: hashing it would take longer than a second


@dataclass(frozen=True, slots=True)
class TokenFile:
    """A file of tokens: its path, the numpy type of a token, their number, and the xxh3-128 of the file."""

    path: str
    dtype: str
    count: int
    digest: str

    def open(self) -> np.ndarray:
        """Map the tokens into memory, read-only."""
        # A plain array on the map: slices of np.memmap itself are slower to make.
        return np.asarray(np.memmap(self.path, dtype=self.dtype, mode="r", shape=(self.count,)))


def prepare_tokens(source: TextFiles, tokenizer: Any, *, split: str, cache_dir: str) -> TokenFile:
    """Return the token file of one split of ``source``, made now unless an intact one exists.

    Several processes may call this at once. They wait for each other if the file system has locks; otherwise each
    renames an equal file into place. Raises ConfigError for a source without files or a directory that cannot
    be written, RunError when a file cannot be read.
    """
    files = source.files(split)
    base = Path(cache_dir) / f"{source.name}-{_key(source.root, files, tokenizer)}-{split}"
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        with _lock(base.with_name(base.name + ".lock")):
            return read_token_file(base) or _make(base, source.root, files, tokenizer)
    except UnusableFileError as error:
        raise ConfigError(f"dataset.cache_dir: {error.filename} cannot be used as a lock: {error}") from error
    except OSError as error:
        raise ConfigError(
            f"dataset.cache_dir: cannot write tokens to {str(base.parent)!r}: {error.strerror or error}; "
            "name another directory"
        ) from error


def read_token_file(base: Path) -> TokenFile | None:
    """Return the intact token file at ``base`` (without suffix), or None if it is missing, truncated or damaged."""
    path = base.with_name(base.name + ".bin")
    try:
        described = json.loads(read_bounded(base.with_name(base.name + ".json"), _DESCRIPTION_LIMIT))
        if described.pop("format") != _FORMAT:
            return None
        tokens = TokenFile(path=str(path), **described)
        size = path.stat().st_size
        if size == 0 or tokens.dtype not in _DTYPES or size != tokens.count * np.dtype(tokens.dtype).itemsize:
            return None
        return tokens if size > _HASHED_BYTES or hash_file(path) == tokens.digest else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _make(base: Path, root: Path, files: list[str], tokenizer: Any) -> TokenFile:
    dtype = token_dtype(tokenizer.vocab_size)
    hasher = xxhash.xxh3_128()
    count = 0

    def write_tokens(out: IO[bytes]) -> None:
        nonlocal count
        for name in files:
            content = encode_file(tokenizer, _read(root / name)).astype(dtype, copy=False)
            data = content.tobytes()
            out.write(data)
            hasher.update(data)
            count += content.size

    path = base.with_name(base.name + ".bin")
    _replace(path, write_tokens)
    if count == 0:
        path.unlink()
        raise ConfigError(f"source.root: the {len(files)} files below {str(root)!r} contain no text")
    tokens = TokenFile(path=str(path), dtype=dtype.name, count=count, digest=hasher.hexdigest())
    described = {"format": _FORMAT, **{key: value for key, value in asdict(tokens).items() if key != "path"}}
    text = json.dumps(described, indent=1) + "\n"
    _replace(base.with_name(base.name + ".json"), lambda out: out.write(text.encode()))
    return tokens


def _read(path: Path) -> bytes:
    try:
        with open(open_regular(path), "rb") as file:  # noqa: PTH123 - a handle, not a path
            return file.read()
    except OSError as error:
        raise RunError(
            f"training text {str(path)!r} cannot be read: {error.strerror or error}; fix it, or exclude it with "
            "source.exclude"
        ) from error


def _key(root: Path, files: list[str], tokenizer: Any) -> str:
    """Identify the input without reading it: the tokenizer, and path, size and time of every file."""
    hasher = hashlib.sha256(f"{_FORMAT} {tokenizer_fingerprint(tokenizer)} {os.fspath(root.resolve())}\n".encode())
    for name in files:
        try:
            status = (root / name).stat()
        except OSError as error:
            raise RunError(f"training text {str(root / name)!r} cannot be read: {error.strerror or error}") from error
        hasher.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return hasher.hexdigest()[:12]


def _replace(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file atomically, under a unique name first: several processes may be writing equal files."""
    with replacing(path, aside=path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")) as aside, aside.open("xb") as out:
        write(out)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock, which the system releases when the process dies; none where locks are not supported."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = open_private(path)
    try:
        with contextlib.suppress(OSError):  # some network file systems refuse; the renames are safe without
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
