"""``tensors.json``: where each tensor of a checkpoint lies, piece by piece.

A tensor that one process held whole has one piece; a sharded one has a piece per rank. Pieces never overlap and
together cover the tensor. Sections keep what belongs together: ``model``, ``optimizer``, ``ema``, ...
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from mmtrain.checkpoint.manifest import check_inside
from mmtrain.errors import CheckpointError

INDEX = "tensors.json"


@dataclass(frozen=True, slots=True)
class PieceEntry:
    """A box of a tensor: ``shape`` elements from ``offsets`` on, row-major in ``file`` from byte ``start`` on."""

    file: str
    start: int
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: its safetensors type name (``F32``, ``BF16``, ...), its whole shape, its pieces.

    With ``alias`` set it is the same memory as that other tensor of the section and has no pieces of its own.
    """

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[PieceEntry, ...] = ()
    alias: str | None = None


Index = dict[str, dict[str, TensorEntry]]


def encode_index(index: Index) -> bytes:
    """Return the bytes of ``tensors.json``."""
    document: dict[str, Any] = {}
    for section, entries in index.items():
        document[section] = {name: _entry_to_json(entry) for name, entry in entries.items()}
    return json.dumps(document, separators=(",", ":")).encode()


def decode_index(data: bytes, where: str = INDEX) -> Index:
    """Read what `encode_index` gave. Raises CheckpointError where it is malformed."""
    try:
        document = json.loads(data)
        index = {
            section: {name: _entry_from_json(entry) for name, entry in entries.items()}
            for section, entries in document.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where}: malformed ({error})") from error
    for entries in index.values():
        for entry in entries.values():
            for piece in entry.pieces:
                check_inside(piece.file, where)
    return index


def merge(parts: Sequence[Index]) -> Index:
    """Join what each rank wrote into one index, names in order.

    Raises CheckpointError where the ranks disagree about a tensor or the pieces do not cover it: such a checkpoint must
    not come to be.
    """
    merged: Index = {}
    for section in sorted({section for part in parts for section in part}):
        names = sorted({name for part in parts for name in part.get(section, {})})
        merged[section] = {}
        for name in names:
            versions = [part[section][name] for part in parts if name in part.get(section, {})]
            merged[section][name] = _join(f"{section}/{name}", versions)
    return merged


def _join(path: str, versions: Sequence[TensorEntry]) -> TensorEntry:
    first = versions[0]
    if any((v.dtype, v.shape) != (first.dtype, first.shape) for v in versions):
        raise CheckpointError(f"{path}: the ranks hold it with different types or shapes: {_described(versions)}")
    pieces = tuple(piece for version in versions for piece in version.pieces)
    alias = next((version.alias for version in versions if version.alias is not None), None)
    if alias is not None and not pieces:
        return TensorEntry(first.dtype, first.shape, alias=alias)
    held = sum(prod(piece.shape) for piece in pieces)
    if held != prod(first.shape):
        raise CheckpointError(f"{path}: the ranks hold {held} of its {prod(first.shape)} elements")
    return TensorEntry(first.dtype, first.shape, pieces)


def _described(versions: Iterable[TensorEntry]) -> str:
    return ", ".join(sorted({f"{version.dtype}{list(version.shape)}" for version in versions}))


def _entry_to_json(entry: TensorEntry) -> dict[str, Any]:
    document: dict[str, Any] = {"dtype": entry.dtype, "shape": entry.shape}
    if entry.alias is not None:
        document["alias"] = entry.alias
    else:
        document["pieces"] = [
            {"file": p.file, "start": p.start, "offsets": p.offsets, "shape": p.shape} for p in entry.pieces
        ]
    return document


def _entry_from_json(document: Mapping[str, Any]) -> TensorEntry:
    pieces = tuple(
        PieceEntry(str(p["file"]), int(p["start"]), tuple(p["offsets"]), tuple(p["shape"]))
        for p in document.get("pieces", ())
    )
    return TensorEntry(str(document["dtype"]), tuple(document["shape"]), pieces, document.get("alias"))
