"""Reads a checkpoint: its manifest, its plain state, and its tensors, straight into existing memory."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtrain import heartbeat
from mmtrain.checkpoint.format import check, tree
from mmtrain.checkpoint.format.index import Index, ShardEntry, TensorEntry
from mmtrain.checkpoint.format.manifest import Manifest
from mmtrain.checkpoint.format.structure import read_file, read_index
from mmtrain.checkpoint.format.tensors import DTYPES, is_plain
from mmtrain.checkpoint.format.verify import Verify, files_here, find_problems, parts_here, read_manifest
from mmtrain.checkpoint.shard_reader import ShardReader
from mmtrain.checkpoint.sharding import overlap
from mmtrain.dtensor import local_box, narrow_to_box
from mmtrain.errors import CheckpointError
from mmtrain.printable import listed

_SHARES = 64  # jobs of each thread in a load: tensors differ in size


@dataclass(slots=True)
class LoadReport:
    """What `Checkpoint.load` did, by name.

    ``matched`` were copied; ``missing`` are not in the checkpoint, ``unexpected`` only in the checkpoint; ``cast`` were
    converted to another type.
    """

    matched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong_shape: list[str] = field(default_factory=list)
    cast: list[str] = field(default_factory=list)


class Checkpoint:
    """A checkpoint directory, open for reading. Tensors are read when asked for; nothing is ever executed."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._index: Index | None = None
        self._here = frozenset(files_here(path, manifest))  # not those that only other disks have

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, iteration={self.manifest.iteration})"

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def index(self) -> Index:
        """Where each tensor is: section, then name."""
        if self._index is None:
            self._index = read_index(self.path, self.manifest)
        return self._index

    def state(self) -> Any:
        """The plain state that was saved, its tensors on the CPU."""
        return self._tree("state")

    def state_by_name(self) -> dict[str, Any]:
        """As `state`, which for a run is a dict: name to state. Raises CheckpointError where it is another value."""
        state = self.state()
        if not isinstance(state, dict):
            kind = type(state).__name__
            raise CheckpointError(f"{self.path / 'state.json'}: expected the state of a run by name, found a {kind}")
        return state

    def rng(self, rank: int = 0) -> Any:
        """What rank ``rank`` saved as its generators.

        None if it saved none (a larger world than at the save) or if it is on another disk.
        """
        stem = f"rng/rank_{rank:05d}"
        return self._tree(stem) if f"{stem}.json" in self._here else None

    def sections(self) -> list[str]:
        """The sections of tensors that were saved, without those of `state` and `rng`."""
        return [section for section in self.index if section in self.manifest.sections]

    def tensor_names(self, section: str) -> list[str]:
        """The names in a section; [] for one that was not saved."""
        return list(self.index.get(section, {}))

    def tensor_info(self, section: str, name: str) -> TensorEntry:
        """Type and full shape of a tensor. Raises CheckpointError for one that was not saved."""
        try:
            return self.index[section][name]
        except KeyError:
            raise CheckpointError(f"{self.path}: there is no tensor {name!r} in section {section!r}") from None

    def read(self, section: str, name: str) -> Tensor:
        """Read one full tensor into new memory."""
        entry = self.tensor_info(section, name)
        try:
            target = torch.empty(entry.shape, dtype=saved_dtype(entry))
        except RuntimeError as error:
            raise CheckpointError(
                f"{self.path}: no memory for {section}/{name}, {list(entry.shape)} {entry.dtype}"
            ) from error
        with ShardReader(self.path) as reader:
            self._fill(target, self._source(section, name), reader)
        return target

    def load(self, section: str, into: Mapping[str, Tensor], *, strict: bool = True, threads: int = 2) -> LoadReport:
        """Copy tensors into those of ``into``, in place; each process reads only what its shards need.

        Targets may be parameters, on any device, of another type (the values are then converted), or sharded
        differently than at the save. Names and shapes are checked first: with ``strict``, a misfit raises
        CheckpointError and nothing is changed. A tensor of a wrong shape is never loaded.
        """
        report = self._compare(section, into)
        if strict:
            self._refuse(section, report)
        names = report.matched
        share = -(-len(names) // (threads * _SHARES)) or 1  # many tensors are small: a job for each would cost more
        with ShardReader(self.path) as reader, ThreadPoolExecutor(threads) as pool:

            def fill(start: int) -> None:
                for name in names[start : start + share]:
                    self._fill(into[name], self._source(section, name), reader)

            list(pool.map(fill, range(0, len(names), share)))
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
            "with a different shape": report.wrong_shape,
        }
        found = [f"{len(names)} {what}: {listed(names)}" for what, names in faults.items() if names]
        if found:
            raise CheckpointError(
                f"{self.path}: section {section!r} does not fit this run; "
                + "; ".join(found)
                + "; train the model that was saved, or start from its weights: resume=False, load_from=<checkpoint>"
            )

    def _source(self, section: str, name: str) -> TensorEntry:
        """The entry that has the shards: the tensor's, or that of the one it is an alias of."""
        entry = self.tensor_info(section, name)
        return entry if entry.alias is None else self.tensor_info(section, entry.alias)

    def _fill(self, target: Tensor, source: TensorEntry, reader: ShardReader) -> None:
        heartbeat.beat()
        local, box = local_box(target)
        dtype = saved_dtype(source)
        filled = 0
        for saved in source.shards:
            shared = overlap(box, saved)
            if shared is None:
                continue
            shard = self._on_this_disk(saved)
            filled += prod(shared[1])
            destination = narrow_to_box(local, box[0], shared)
            if shared == (shard.offsets, shard.shape) and dtype == local.dtype and is_plain(destination):
                reader.read_into(shard, destination)
            else:
                destination.copy_(narrow_to_box(reader.mapped(shard, dtype), shard.offsets, shared))
        if filled != prod(box[1]):
            files = ", ".join(sorted({shard.file for shard in source.shards})) or "no file"
            raise CheckpointError(f"{self.path}: {files} has {filled} of the {prod(box[1])} elements of a tensor")

    def _on_this_disk(self, shard: ShardEntry) -> ShardEntry:
        """The same box in a file that is in this directory."""
        for location in shard.locations():
            if location.file in self._here:
                return location
        here = {part.marker for part in parts_here(self.path, self.manifest)}
        missing = [part for part in self.manifest.parts if part.marker not in here]
        parts = f"{len(missing)} of its {len(self.manifest.parts)} parts"
        raise CheckpointError(
            f"{self.path}: {shard.file} is needed here but is on the disk of another node: this directory lacks "
            f"{parts} ({', '.join(_ranks(part.ranks) for part in missing)}). Continue with as many processes as saved "
            f"it ({self.manifest.world_size}) and the nodes in the same order, or copy the directories {self.name} of "
            "all nodes into one (their files have different names) and put that on each node"
        )

    def _tree(self, stem: str) -> Any:
        path = self.path / f"{stem}.json"
        document = check.parse(read_file(path), str(path))
        tensors = {name: self.read(stem, name) for name in self.index.get(stem, {})}
        try:
            return tree.join(document, tensors)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error


def open_checkpoint(name_or_path: str | Path, *, root: Path | None = None, verify: Verify = "full") -> Checkpoint:
    """Open a checkpoint directory. A relative path is looked for in ``root`` first.

    Raises CheckpointError, with every faulty file, if it is missing, damaged or not a checkpoint of mmtrain.
    """
    path = Path(name_or_path)
    if root is not None and not path.is_absolute() and _exists(root / path):
        path = root / path
    if not _exists(path):
        also = "" if root is None else f" (also looked in {root})"
        raise CheckpointError(f"{path}: no such checkpoint{also}")
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: a file cannot be resumed from, because it has weights at most. To start from its weights, set "
            "load_from to it and resume=False"
        )
    manifest = read_manifest(path)
    problems = find_problems(path, manifest, verify=verify)
    if problems:
        raise CheckpointError(f"{path} is damaged: " + "; ".join(f"{p.file}: {p.fault}" for p in problems))
    return Checkpoint(path, manifest)


def _exists(path: Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110 - unlike Path.exists it takes any text: too long, with a NUL


def saved_dtype(entry: TensorEntry) -> torch.dtype:
    """The torch type of a saved tensor. Raises CheckpointError for one that this torch does not have."""
    if entry.dtype not in DTYPES:
        raise CheckpointError(
            f"the checkpoint has a tensor of type {entry.dtype}, which this version of torch does not have"
        )
    return DTYPES[entry.dtype]


def _ranks(ranks: Sequence[int]) -> str:
    return f"of rank {ranks[0]}" if len(ranks) == 1 else f"of ranks {listed([*map(str, ranks)])}"
