"""What one rank will write of a checkpoint, and which rank writes each plain tensor."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmtrain.checkpoint.format import tree
from mmtrain.checkpoint.format.index import Index, ShardEntry, TensorEntry
from mmtrain.checkpoint.format.tensors import Layout, dtype_name, lay_out, lay_out_one
from mmtrain.checkpoint.sharding import LocalShards, TensorShard, spread
from mmtrain.checkpoint.topology.base import Topology
from mmtrain.checkpoint.write import storage
from mmtrain.dtensor import is_dtensor
from mmtrain.errors import CheckpointError
from mmtrain.files import hash_bytes

Sections = Mapping[str, Mapping[str, Tensor]]
Sizes = dict[str, dict[str, int]]  # section -> name of a plain tensor -> bytes
Writers = dict[str, dict[str, int]]  # section -> name -> the rank that writes this plain tensor
_SECTION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(slots=True)
class Plan:
    """What this rank will write: laid-out tensors (``large`` are staged, ``small`` are copies already) and JSON.

    ``documents`` are the values of JSON files by path; nothing that changes later is in them.
    """

    large: list[Layout] = field(default_factory=list)
    small: list[Layout] = field(default_factory=list)
    documents: dict[str, Any] = field(default_factory=dict)
    index: Index = field(default_factory=dict)

    def add_tree(self, stem: str, value: Any) -> None:
        """Plan a nested plain value: ``<stem>.json``, and ``<stem>.safetensors`` if it holds tensors."""
        document, tensors = tree.split(value, path=stem.partition("/")[0])
        self.documents[f"{stem}.json"] = document
        if tensors:
            shards = [TensorShard.full(name, tensor) for name, tensor in tensors.items()]
            layout = lay_out_one(stem, f"{stem}.safetensors", shards)
            self.small.append(layout)
            self.index[stem] = _entries([layout], shards)


def plan_section(section: str, local: LocalShards, *, rank: int) -> tuple[list[Layout], dict[str, TensorEntry]]:
    """The files that this rank writes of a section, and its part of the index."""
    layouts = lay_out(section, f"{section}/rank_{rank:05d}", local.written())
    entries = _entries(layouts, local.shards)
    by_name = {shard.name: shard for shard in local.shards}
    for name, target in local.aliases.items():
        shard = by_name[name]
        code = dtype_name(shard.tensor.dtype, f"{section}/{name}")
        entries[name] = TensorEntry(code, shard.shape, alias=target)
    return layouts, entries


def _entries(layouts: Sequence[Layout], shards: Sequence[TensorShard]) -> dict[str, TensorEntry]:
    by_name = {shard.name: shard for shard in shards}
    entries = {}
    for layout in layouts:
        for name, start in zip(layout.names, layout.starts, strict=True):
            shard = by_name[name]
            entry = ShardEntry(layout.path, len(layout.header) + start, shard.offsets, tuple(shard.tensor.shape))
            entries[name] = TensorEntry(dtype_name(shard.tensor.dtype, name), shard.shape, (entry,))
    return entries


def digest_of(tensors: Sections) -> tuple[str, Sizes]:
    """The bytes of each plain tensor by section and name, and a hash of them."""
    sizes = {s: {n: _size(t) for n, t in named.items() if not is_dtensor(t)} for s, named in tensors.items()}
    return hash_bytes(repr(sorted((s, sorted(n.items())) for s, n in sizes.items())).encode()), sizes


def _size(value: Any) -> int:
    """0 for what has no bytes to write: `collect` refuses it by its name."""
    return value.nbytes if isinstance(value, Tensor) and value.layout is torch.strided else 0


def choose_writers(
    sizes: Sizes, digests: Sequence[str], topology: Topology, *, spread_sections: Collection[str]
) -> Writers:
    """The rank that writes each plain tensor; a collective if the ranks' ``digests`` differ.

    Each disk gets every plain tensor from one of its ranks; those of ``spread_sections`` are spread over them.
    """
    ranks = topology.disk_ranks
    if len({*digests}) == 1:
        writers = {s: dict.fromkeys(named, ranks[0]) for s, named in sizes.items()}
        for section in set(spread_sections) & sizes.keys():
            slots = spread(sizes[section], len(ranks))
            writers[section] = {n: ranks[slot] for n, slot in slots.items()}
        return writers
    # some ranks hold what others do not: the first that holds a tensor writes it
    all_sizes = topology.ranks.gather(sizes)
    return {s: {n: rank for rank in reversed(ranks) for n in all_sizes[rank].get(s, {})} for s in sizes}


def check_names(name: str, tensors: Sections) -> None:
    """Raise CheckpointError for a name of a checkpoint or section that its files could not have."""
    if not name or name.startswith(".") or "/" in name or "\\" in name or name == storage.POINTER:
        raise CheckpointError(f"{name!r} cannot be the name of a checkpoint")
    for section in tensors:
        if not _SECTION.fullmatch(section) or section in ("state", "rng"):
            raise CheckpointError(f"{section!r} cannot be the name of a section of tensors")
