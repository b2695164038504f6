"""JSON of unknown origin: parsed, and compared with the types that the format gives its fields, in one place.

What a checkpoint says is not trusted before this: a value of a wrong type would fail much later, in the middle of a
run, with an error that names neither file nor field.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from mmtrain.errors import CheckpointError

JSON_LIMIT = 4 << 30  # bytes of one JSON file of a checkpoint; an index takes about 110 for each shard
_LONGEST = 1024  # characters of a file's path in a checkpoint
_CONTROL = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of values: ``title`` as a message calls it, and whether a value is one."""

    title: str
    holds: Callable[[Any], bool]

    def or_none(self) -> "Kind":
        return Kind(f"{self.title} or null", lambda value: value is None or self.holds(value))


def _is_whole(value: Any, least: int, limit: int) -> bool:
    return type(value) is int and least <= value < limit


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{32}", value) is not None


def _is_list_of(kind: Kind, value: Any, *, limit: int | None = None) -> bool:
    return isinstance(value, list) and (limit is None or len(value) <= limit) and all(map(kind.holds, value))


TEXT = Kind("text", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
WHOLE = Kind("a whole number below 2^64", lambda value: _is_whole(value, -(1 << 64), 1 << 64))
COUNT = Kind("a whole number from 0 to 2^64", lambda value: _is_whole(value, 0, 1 << 64))
SIZE = Kind("a whole number from 0 to 2^63", lambda value: _is_whole(value, 0, 1 << 63))
POSITIVE = Kind("a whole number from 1 to 2^31", lambda value: _is_whole(value, 1, 1 << 31))
PROCESSES = Kind("a number of processes from 1 to 2^20", lambda value: _is_whole(value, 1, (1 << 20) + 1))
HASH = Kind("32 lower-case hex digits", _is_hash)
SHAPE = Kind("a list of at most 64 sizes", lambda value: _is_list_of(SIZE, value, limit=64))
COUNTS = Kind("a list of whole numbers", lambda value: _is_list_of(COUNT, value))
TEXTS = Kind("a list of texts", lambda value: _is_list_of(TEXT, value))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
LIST = Kind("a list", lambda value: isinstance(value, list))


def size(data: bytes, what: str) -> None:
    """Refuse to write what `JSON_LIMIT` keeps from being read."""
    if len(data) > JSON_LIMIT:
        raise CheckpointError(f"{what} has {len(data)} bytes of JSON, and a reader takes {JSON_LIMIT} at most")


def parse(data: bytes, where: str) -> Any:
    """Parse a JSON file. Raises CheckpointError, naming ``where``, for what is not JSON."""
    try:
        return json.loads(data.decode("utf-8"))
    except RecursionError as error:
        raise CheckpointError(f"{where}: not valid JSON of a checkpoint (nested too deeply)") from error
    except ValueError as error:
        raise CheckpointError(f"{where}: not valid JSON ({error})") from error


def one(value: Any, kind: Kind, path: str) -> None:
    """Raise ValueError, naming the field ``path``, for a value that is not of its kind."""
    if not kind.holds(value):
        raise ValueError(f"{path[:_LONGEST]} is {_shown(value)}, expected {kind.title}")


def fields(document: Any, kinds: Mapping[str, Kind], path: str, *, required: bool = False) -> None:
    """`one` for each field of an object, at ``path`` in the document ("" for all of it), that ``kinds`` knows.

    With ``required`` all of these must be there.
    """
    one(document, OBJECT, path)
    for name, kind in kinds.items():
        place = f"{path[:_LONGEST]}.{name}" if path else name
        if name in document:
            one(document[name], kind, place)
        elif required:
            raise ValueError(f"{place} is missing")


def values(document: Any, kind: Kind, path: str) -> None:
    """`one` for every value of an object."""
    one(document, OBJECT, path)
    for name, value in document.items():
        one(value, kind, f"{path}.{name}")


def inside(path: Any, where: str) -> None:
    """Refuse what is not the name of a file inside the checkpoint's directory."""
    if isinstance(path, str) and len(path) <= _LONGEST and not _CONTROL.search(path):
        pure = PurePosixPath(path)
        if not pure.is_absolute() and ".." not in pure.parts and pure.parts:
            return
    raise CheckpointError(f"{where}: it lists {_shown(path)}, which is not inside the checkpoint")


def _shown(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
