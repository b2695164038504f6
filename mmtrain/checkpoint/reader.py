"""Reading a checkpoint: its manifest, its plain state, and its tensors straight into memory that is there already."""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtrain import heartbeat
from mmtrain.checkpoint.format import tree
from mmtrain.checkpoint.format.index import INDEX, Index, PieceEntry, TensorEntry, decode_index
from mmtrain.checkpoint.format.manifest import Manifest
from mmtrain.checkpoint.format.tensors import DTYPES, is_plain
from mmtrain.checkpoint.format.verify import files_here, parts_here
from mmtrain.checkpoint.shard_reader import PieceReader
from mmtrain.checkpoint.sharding import overlap
from mmtrain.dtensor import local_box, narrow_to_box
from mmtrain.errors import CheckpointError

_SHOWN = 5


@dataclass(slots=True)
class LoadReport:
    """What `Checkpoint.load` did: names copied, wanted but absent, present but not wanted, and of another shape.

    ``cast`` names those that were copied into another type than they were saved in.
    """

    matched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong_shape: list[str] = field(default_factory=list)
    cast: list[str] = field(default_factory=list)


class Checkpoint:
    """A checkpoint directory, open for reading. Nothing is read before it is asked for; nothing is ever executed."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._index: Index | None = None
        # The files of this disk's part; None where the checkpoint is not divided among disks.
        self._here = frozenset(files_here(path, manifest)) if manifest.parts else None

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, iteration={self.manifest.iteration})"

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def index(self) -> Index:
        """Where each tensor lies: section, then name."""
        if self._index is None:
            self._index = decode_index(self._read(INDEX), str(self.path / INDEX))
        return self._index

    def state(self) -> Any:
        """The plain state that was saved, its tensors on the CPU."""
        return self._tree("state")

    def rng(self, rank: int = 0) -> Any:
        """What rank ``rank`` saved as its generators.

        None where it saved none (a larger world than at the save) or where it lies on another disk.
        """
        stem = f"rng/rank_{rank:05d}"
        files = self.manifest.files if self._here is None else self._here
        return self._tree(stem) if f"{stem}.json" in files else None

    def sections(self) -> list[str]:
        """The sections of tensors that were saved (`state` and `rng` have functions of their own)."""
        return [section for section in self.index if section in self.manifest.sections]

    def tensor_names(self, section: str) -> list[str]:
        """The names in a section; [] for one that was not saved."""
        return list(self.index.get(section, {}))

    def tensor_info(self, section: str, name: str) -> TensorEntry:
        """Type and whole shape of a tensor (an alias has those of the tensor it stands for)."""
        try:
            return self.index[section][name]
        except KeyError:
            raise CheckpointError(f"{self.path}: it holds no tensor {name!r} in section {section!r}") from None

    def read(self, section: str, name: str) -> Tensor:
        """Read one whole tensor into new memory."""
        entry = self.tensor_info(section, name)
        target = torch.empty(entry.shape, dtype=saved_dtype(entry))
        with PieceReader(self.path) as reader:
            self._fill(target, self._source(section, name), reader)
        return target

    def load(self, section: str, into: Mapping[str, Tensor], *, strict: bool = True, threads: int = 2) -> LoadReport:
        """Copy tensors into those of ``into``, in place, each process reading only what its own memory needs.

        Targets may be parameters, on any device, of another type (the values are then converted), or sharded otherwise
        than at the save. Names are checked first: unless everything fits, ``strict`` raises CheckpointError and nothing
        has been changed. A wrong shape is never loaded.
        """
        report = self._compare(section, into)
        if strict:
            self._refuse(section, report)
        with PieceReader(self.path) as reader, ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda name: self._fill(into[name], self._source(section, name), reader), report.matched))
        return report

    def _compare(self, section: str, into: Mapping[str, Tensor]) -> LoadReport:
        saved = self.index.get(section, {})
        report = LoadReport(unexpected=[name for name in saved if name not in into])
        for name, target in into.items():
            if name not in saved:
                report.missing.append(name)
            elif tuple(target.shape) != saved[name].shape:
                report.wrong_shape.append(f"{name} (saved {list(saved[name].shape)}, here {list(target.shape)})")
            else:
                report.matched.append(name)
                if target.dtype != saved_dtype(saved[name]):
                    report.cast.append(name)
        return report

    def _refuse(self, section: str, report: LoadReport) -> None:
        faults = {
            "missing in the checkpoint": report.missing,
            "not in this run": report.unexpected,
            "of another shape": report.wrong_shape,
        }
        told = [f"{len(names)} {what}: {_some(names)}" for what, names in faults.items() if names]
        if told:
            raise CheckpointError(
                f"{self.path}: section {section!r} does not fit this run; "
                + "; ".join(told)
                + "; train what was saved, or begin anew from its weights: resume=False, load_from=<checkpoint>"
            )

    def _source(self, section: str, name: str) -> TensorEntry:
        """The entry that has the pieces: the tensor's own, or that of the one it is an alias of."""
        entry = self.tensor_info(section, name)
        return entry if entry.alias is None else self.tensor_info(section, entry.alias)

    def _fill(self, target: Tensor, source: TensorEntry, reader: PieceReader) -> None:
        heartbeat.beat()
        local, box = local_box(target)
        dtype = saved_dtype(source)
        filled = 0
        for saved in source.pieces:
            shared = overlap(box, saved)
            if shared is None:
                continue
            piece = saved if self._here is None else self._on_this_disk(saved)
            filled += prod(shared[1])
            destination = narrow_to_box(local, box[0], shared)
            if shared == (piece.offsets, piece.shape) and dtype == local.dtype and is_plain(destination):
                reader.read_into(piece, destination)
            else:
                destination.copy_(narrow_to_box(reader.mapped(piece, dtype), piece.offsets, shared))
        if filled != prod(box[1]):
            files = ", ".join(sorted({piece.file for piece in source.pieces})) or "no file"
            raise CheckpointError(f"{self.path}: {files} hold {filled} of the {prod(box[1])} elements of a tensor")

    def _on_this_disk(self, piece: PieceEntry) -> PieceEntry:
        """The same box in a file that lies here."""
        for place in piece.places():
            if self._here is None or place.file in self._here:
                return place
        here = {part.marker for part in parts_here(self.path, self.manifest)}
        away = [part for part in self.manifest.parts if part.marker not in here]
        parts = f"{len(away)} of its {len(self.manifest.parts)} parts"
        raise CheckpointError(
            f"{self.path}: {piece.file} is needed here and lies on the disk of another node: this directory lacks "
            f"{parts} ({', '.join(_ranks(part.ranks) for part in away)}); go on with as many processes as saved it "
            f"({self.manifest.world_size}) and the nodes in the same order, or copy the directories {self.name} of all "
            "nodes into one (the names of their files differ) and put that on each node"
        )

    def _tree(self, stem: str) -> Any:
        try:
            document = json.loads(self._read(f"{stem}.json"))
        except ValueError as error:
            raise CheckpointError(f"{self.path / stem}.json: not valid JSON ({error})") from error
        return tree.join(document, {name: self.read(stem, name) for name in self.index.get(stem, {})})

    def _read(self, path: str) -> bytes:
        try:
            return (self.path / path).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{self.path / path}: cannot be read ({error})") from error


def saved_dtype(entry: TensorEntry) -> torch.dtype:
    """The torch type of a saved tensor. Raises CheckpointError for one that this torch does not have."""
    if entry.dtype not in DTYPES:
        raise CheckpointError(
            f"the checkpoint holds a tensor of type {entry.dtype}, which this version of torch has not"
        )
    return DTYPES[entry.dtype]


def _ranks(ranks: Sequence[int]) -> str:
    return f"of rank {ranks[0]}" if len(ranks) == 1 else f"of ranks {_some([*map(str, ranks)])}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
