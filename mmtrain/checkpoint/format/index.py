"""``tensors.json``: where the bytes of each tensor of a checkpoint are, shard by shard.

A tensor that one process held in full has one shard; a sharded one has a shard per rank. Shards never overlap and
together cover the tensor. Sections keep what belongs together: ``model``, ``optimizer``, ``ema``, ...
"""

import gc
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from mmtrain.checkpoint.format import check
from mmtrain.errors import CheckpointError

INDEX = "tensors.json"
_TENSOR = {"dtype": check.TEXT, "shape": check.SHAPE}
_PLACE = {"file": check.TEXT, "start": check.SIZE}
_SHARD = {**_PLACE, "offsets": check.SHAPE, "shape": check.SHAPE}


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """A box of a tensor: ``shape`` elements at ``offsets``, row-major in ``file`` from byte ``start`` on.

    ``copies`` are further locations, file and start, of the same bytes: on other disks.
    """

    file: str
    start: int
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    copies: tuple[tuple[str, int], ...] = ()

    def locations(self) -> Iterator["ShardEntry"]:
        """The box in each file that holds it."""
        yield self
        for file, start in self.copies:
            yield ShardEntry(file, start, self.offsets, self.shape)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: its safetensors type name (``F32``, ``BF16``, ...), its full shape, its shards.

    With ``alias`` set it is the same memory as that other tensor of the section and has no shards.
    """

    dtype: str
    shape: tuple[int, ...]
    shards: tuple[ShardEntry, ...] = ()
    alias: str | None = None


Index = dict[str, dict[str, TensorEntry]]


def encode_index(index: Index) -> bytes:
    """Return the bytes of ``tensors.json``. Raises CheckpointError if a reader would not take so many."""
    return join_sections({section: encode_section(entries) for section, entries in index.items()})


def encode_section(entries: Mapping[str, TensorEntry]) -> str:
    """One section of ``tensors.json``, for `join_sections`."""
    return json.dumps({name: _entry_to_json(entry) for name, entry in entries.items()}, separators=(",", ":"))


def join_sections(sections: Mapping[str, str]) -> bytes:
    """`encode_index` from its sections, each as `encode_section` gave it."""
    data = ("{" + ",".join(f"{json.dumps(name)}:{text}" for name, text in sections.items()) + "}").encode()
    check.size(data, INDEX)
    return data


def decode_index(data: bytes, where: str = INDEX) -> Index:
    """Read what `encode_index` gave. Raises CheckpointError, naming ``where``, if it is malformed."""
    try:
        with _without_collections():
            index = _index_from_json(check.parse(data, where))
    except ValueError as error:
        raise CheckpointError(f"{where}: malformed ({error})") from error
    for file in {location.file for entry in entries_of(index) for one in entry.shards for location in one.locations()}:
        check.inside(file, where)
    return index


@contextmanager
def _without_collections() -> Iterator[None]:
    """Pause the garbage collector while many objects are made, none of which is garbage: it takes half the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _index_from_json(document: Any) -> Index:
    check.values(document, check.OBJECT, "the index")
    index: Index = {}
    for section, entries in document.items():
        found = index[section] = {}
        for name, entry in entries.items():
            found[name] = _entry_from_json(entry, f"{section}/{name}")
        _check_aliases(found, section)
    return index


def entries_of(index: Index) -> Iterator[TensorEntry]:
    """The entries of all sections."""
    return (entry for entries in index.values() for entry in entries.values())


def _check_aliases(entries: Mapping[str, TensorEntry], section: str) -> None:
    for name, entry in entries.items():
        if entry.alias is not None and getattr(entries.get(entry.alias), "alias", name) is not None:
            raise ValueError(f"{section}/{name} is an alias of {entry.alias!r}, which is not a tensor of this section")


def merge(indexes: Sequence[Index], *, copies: bool = False) -> Index:
    """Join the indexes of what each rank wrote into one, names in order.

    With ``copies`` several ranks may have written the same box, to different disks. Raises CheckpointError if the
    ranks disagree about a tensor or the shards do not cover it: such a checkpoint must not be committed.
    """
    found: dict[str, dict[str, list[TensorEntry]]] = {}
    for index in indexes:  # ranks may have different sections: one loop over the ranks keeps this linear in them
        for section, entries in index.items():
            by_name = found.setdefault(section, {})
            for name, entry in entries.items():
                by_name.setdefault(name, []).append(entry)
    return {
        section: {name: _join(f"{section}/{name}", entries, copies=copies) for name, entries in sorted(by_name.items())}
        for section, by_name in sorted(found.items())
    }


def _join(path: str, versions: Sequence[TensorEntry], *, copies: bool) -> TensorEntry:
    first = versions[0]
    if any((v.dtype, v.shape) != (first.dtype, first.shape) for v in versions):
        raise CheckpointError(f"{path}: ranks hold it with different types or shapes: {_described(versions)}")
    shards = tuple(shard for version in versions for shard in version.shards)
    if copies:
        shards = _with_copies(shards)
    alias = next((version.alias for version in versions if version.alias is not None), None)
    if alias is not None and not shards:
        return TensorEntry(first.dtype, first.shape, alias=alias)
    held = sum(prod(shard.shape) for shard in shards)
    if held != prod(first.shape):
        raise CheckpointError(f"{path}: the ranks hold {held} of its {prod(first.shape)} elements")
    return TensorEntry(first.dtype, first.shape, shards)


def _with_copies(shards: Iterable[ShardEntry]) -> tuple[ShardEntry, ...]:
    """One shard for each box, the first that was written, with the locations of the others."""
    boxes: dict[Any, ShardEntry] = {}
    for shard in shards:
        first = boxes.setdefault((shard.offsets, shard.shape), shard)
        if all((shard.file, shard.start) != (known.file, known.start) for known in first.locations()):
            boxes[shard.offsets, shard.shape] = replace(first, copies=(*first.copies, (shard.file, shard.start)))
    return tuple(boxes.values())


def _described(versions: Iterable[TensorEntry]) -> str:
    return ", ".join(sorted({f"{version.dtype}{list(version.shape)}" for version in versions}))


def _entry_to_json(entry: TensorEntry) -> dict[str, Any]:
    document: dict[str, Any] = {"dtype": entry.dtype, "shape": entry.shape}
    if entry.alias is not None:
        document["alias"] = entry.alias
    else:
        document["pieces"] = [_shard_to_json(shard) for shard in entry.shards]
    return document


def _shard_to_json(shard: ShardEntry) -> dict[str, Any]:
    document = {"file": shard.file, "start": shard.start, "offsets": shard.offsets, "shape": shard.shape}
    if shard.copies:
        document["copies"] = [{"file": file, "start": start} for file, start in shard.copies]
    return document


def _entry_from_json(document: Any, path: str) -> TensorEntry:
    check.fields(document, _TENSOR, path, required=True)
    check.fields(document, {"pieces": check.LIST, "alias": check.TEXT.or_none()}, path)
    shape = tuple(document["shape"])
    alias = document.get("alias")
    shards = tuple(_shard_from_json(one, shape, path) for one in document.get("pieces", ()))
    if alias is None and sum(prod(shard.shape) for shard in shards) != prod(shape):
        raise ValueError(f"the pieces of {path} are not all of its {prod(shape)} elements")
    return TensorEntry(document["dtype"], shape, shards, alias)


def _shard_from_json(document: Any, whole: Sequence[int], path: str) -> ShardEntry:
    check.fields(document, _SHARD, path, required=True)
    offsets, shape = tuple(document["offsets"]), tuple(document["shape"])
    if not len(offsets) == len(shape) == len(whole) or any(
        begin + length > size for begin, length, size in zip(offsets, shape, whole, strict=True)
    ):
        raise ValueError(f"a piece of {path} at {list(offsets)} of shape {list(shape)} is not inside {list(whole)}")
    copies = document.get("copies", ())
    if copies:
        check.one(copies, check.LIST, f"{path}.copies")
        for copy in copies:
            check.fields(copy, _PLACE, f"{path}.copies", required=True)
    places = tuple((copy["file"], copy["start"]) for copy in copies)
    return ShardEntry(document["file"], document["start"], offsets, shape, places)
