"""Changes to the files of a checkpoint that no save makes, with hashes and checksums made to fit them."""

import copy
import json
import os
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mmtrain.files import hash_bytes

DOCUMENTS = ("manifest.json", "tensors.json", "state.json", "rng/rank_00000.json")
DEEP = "a place for a hundred thousand brackets"
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1.5, 2**31, 2**63, 10**30, float("nan"), float("inf"), "", "x", "../../x", "a\0b", "\ud800",
    "\x1b[2J\x1b]0;owned\x07", "y" * 70_000, [], {}, [[]], [None], {"a": None}, {"$tensor": "absent"}, {"$array": 3},
    {"$scalar": "AAAA", "dtype": "O"}, {"$float": "zz"}, {"$dict": [1]}, {"$set": [[]]}, {"$unknown": 1}, DEEP,
)  # fmt: skip
_BLANK = "0" * 32


def changed_documents(directory: Path) -> Iterator[tuple[str, str, Any]]:
    """Every document of a checkpoint with one node replaced by each of `VALUES`, or taken away: (file, what, document)."""
    for file in DOCUMENTS:
        document = json.loads((directory / file).read_text())
        for path in list(_paths(document)):
            for value in VALUES:
                yield (
                    file,
                    f"{'.'.join(map(str, path)) or '<all>'} = {str(value)[:20]!r}",
                    _replaced(document, path, value),
                )
            if path:
                yield file, f"{'.'.join(map(str, path))} gone", _without(document, path)


def _paths(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, item in list(items)[:12]:  # of many generator values a dozen are enough
        yield from _paths(item, (*path, key))


def _replaced(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    document = copy.deepcopy(document)
    holder = document
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    return document


def _without(document: Any, path: tuple[Any, ...]) -> Any:
    document = copy.deepcopy(document)
    holder = document
    for key in path[:-1]:
        holder = holder[key]
    del holder[path[-1]]
    return document


def write(directory: Path, file: str, document: Any) -> None:
    """Put a document into a checkpoint so that size, hash and checksum are right."""
    text = json.dumps(document).replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000)
    write_bytes(directory, file, text.encode())


def write_bytes(directory: Path, file: str, data: bytes) -> None:
    """As `write`, for bytes that may not be JSON."""
    if file != "manifest.json":
        (directory / file).write_bytes(data)
        manifest = json.loads((directory / "manifest.json").read_text())
        manifest["files"][file] = {"size": len(data), "xxh3_128": hash_bytes(data)}
        data = json.dumps(manifest).encode()
    (directory / "manifest.json").write_bytes(_with_checksum(data))


def _with_checksum(data: bytes) -> bytes:
    try:
        document = json.loads(data)
        if not isinstance(document["checksum"], str):
            return data
        old = document["checksum"].encode()
    except (ValueError, KeyError, TypeError, RecursionError):
        return data
    head, found, tail = data.rpartition(old)
    return head + hash_bytes(head + _BLANK.encode() + tail).encode() + tail if found else data


def broken_bytes(data: bytes, seed: int) -> Iterator[tuple[str, bytes]]:
    """Contents that were cut, filled with noise, or are something else: (what, bytes)."""
    generator = random.Random(seed)
    yield "empty", b""
    yield "not UTF-8", b"\xff\xfe" + data
    yield "zeros", bytes(len(data))
    yield "only brackets", b"[" * 100_000
    yield "a number of 5,000 digits", b"9" * 5_000
    for _ in range(4):
        yield "cut", data[: generator.randrange(len(data))]
        place = generator.randrange(len(data))
        yield "noise", data[:place] + generator.randbytes(16) + data[place + 16 :]


def other_kinds(path: Path) -> dict[str, Callable[[], None]]:
    """Makers of what is not a file, in the place of ``path``."""

    def a_socket() -> None:
        with socket.socket(socket.AF_UNIX) as made:
            here = Path.cwd()
            os.chdir(path.parent)  # a socket's address is short
            try:
                made.bind(path.name)
            finally:
                os.chdir(here)

    def link_to_pipe() -> None:
        os.mkfifo(path.with_name("pipe"))
        path.symlink_to("pipe")

    def sparse() -> None:
        with path.open("wb") as file:
            file.truncate(1 << 40)

    return {
        "a pipe": lambda: os.mkfifo(path),
        "a link to a pipe": link_to_pipe,
        "a link to a device": lambda: path.symlink_to("/dev/zero"),
        "a terabyte of zeros": sparse,
        "a folder": path.mkdir,
        "a socket": a_socket,
        "a link to itself": lambda: path.symlink_to(path.name),
        "a link to nothing": lambda: path.symlink_to("absent"),
    }
