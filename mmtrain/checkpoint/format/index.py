"""``tensors.json``: where each tensor of a checkpoint lies, piece by piece.

A tensor that one process held whole has one piece; a sharded one has a piece per rank. Pieces never overlap and
together cover the tensor. Sections keep what belongs together: ``model``, ``optimizer``, ``ema``, ...
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from mmtrain.checkpoint.format.manifest import check_inside
from mmtrain.errors import CheckpointError

INDEX = "tensors.json"


@dataclass(frozen=True, slots=True)
class PieceEntry:
    """A box of a tensor: ``shape`` elements from ``offsets`` on, row-major in ``file`` from byte ``start`` on.

    ``copies`` are further places, file and start, of the same bytes: other disks have their own.
    """

    file: str
    start: int
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    copies: tuple[tuple[str, int], ...] = ()

    def places(self) -> Iterator["PieceEntry"]:
        """The box in each file that holds it."""
        yield self
        for file, start in self.copies:
            yield PieceEntry(file, start, self.offsets, self.shape)


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
                for place in piece.places():
                    check_inside(place.file, where)
    return index


def merge(parts: Sequence[Index], *, copies: bool = False) -> Index:
    """Join what each rank wrote into one index, names in order.

    With ``copies`` several ranks may have written the same box, each to a disk of its own. Raises CheckpointError where
    the ranks disagree about a tensor or the pieces do not cover it: such a checkpoint must not come to be.
    """
    held: dict[str, dict[str, list[TensorEntry]]] = {}
    for part in parts:  # every rank has sections of its own: only one pass over the parts is linear in the ranks
        for section, entries in part.items():
            named = held.setdefault(section, {})
            for name, entry in entries.items():
                named.setdefault(name, []).append(entry)
    return {
        section: {name: _join(f"{section}/{name}", entries, copies=copies) for name, entries in sorted(named.items())}
        for section, named in sorted(held.items())
    }


def _join(path: str, versions: Sequence[TensorEntry], *, copies: bool) -> TensorEntry:
    first = versions[0]
    if any((v.dtype, v.shape) != (first.dtype, first.shape) for v in versions):
        raise CheckpointError(f"{path}: the ranks hold it with different types or shapes: {_described(versions)}")
    pieces = tuple(piece for version in versions for piece in version.pieces)
    if copies:
        pieces = _with_copies(pieces)
    alias = next((version.alias for version in versions if version.alias is not None), None)
    if alias is not None and not pieces:
        return TensorEntry(first.dtype, first.shape, alias=alias)
    held = sum(prod(piece.shape) for piece in pieces)
    if held != prod(first.shape):
        raise CheckpointError(f"{path}: the ranks hold {held} of its {prod(first.shape)} elements")
    return TensorEntry(first.dtype, first.shape, pieces)


def _with_copies(pieces: Iterable[PieceEntry]) -> tuple[PieceEntry, ...]:
    """One piece for each box, the first that was written, with the places of the others."""
    boxes: dict[Any, PieceEntry] = {}
    for piece in pieces:
        first = boxes.setdefault((piece.offsets, piece.shape), piece)
        if all((piece.file, piece.start) != (place.file, place.start) for place in first.places()):
            boxes[piece.offsets, piece.shape] = replace(first, copies=(*first.copies, (piece.file, piece.start)))
    return tuple(boxes.values())


def _described(versions: Iterable[TensorEntry]) -> str:
    return ", ".join(sorted({f"{version.dtype}{list(version.shape)}" for version in versions}))


def _entry_to_json(entry: TensorEntry) -> dict[str, Any]:
    document: dict[str, Any] = {"dtype": entry.dtype, "shape": entry.shape}
    if entry.alias is not None:
        document["alias"] = entry.alias
    else:
        document["pieces"] = [_piece_to_json(piece) for piece in entry.pieces]
    return document


def _piece_to_json(piece: PieceEntry) -> dict[str, Any]:
    document = {"file": piece.file, "start": piece.start, "offsets": piece.offsets, "shape": piece.shape}
    if piece.copies:
        document["copies"] = [{"file": file, "start": start} for file, start in piece.copies]
    return document


def _entry_from_json(document: Mapping[str, Any]) -> TensorEntry:
    pieces = tuple(
        PieceEntry(
            str(p["file"]), int(p["start"]), tuple(p["offsets"]), tuple(p["shape"]),
            tuple((str(copy["file"]), int(copy["start"])) for copy in p.get("copies", ())),
        )
        for p in document.get("pieces", ())
    )  # fmt: skip
    return TensorEntry(str(document["dtype"]), tuple(document["shape"]), pieces, document.get("alias"))
