"""What one rank will write of a checkpoint, and which rank writes each plain tensor."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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
Writers = dict[str, dict[str, int]]  # section -> name -> the rank that writes this plain tensor
_SECTION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(slots=True)
class Plan:
    """What this rank will write: laid-out tensors (``large`` are staged, ``small`` are copies already) and JSON."""

    large: list[Layout] = field(default_factory=list)
    small: list[Layout] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)
    index: Index = field(default_factory=dict)

    def add_section(self, section: str, local: LocalShards, *, rank: int) -> None:
        """Plan a section of tensors."""
        layouts = lay_out(section, f"{section}/rank_{rank:05d}", local.written())
        self.large += layouts
        self._add_to_index(section, layouts)
        by_name = {shard.name: shard for shard in local.shards}
        for name, target in local.aliases.items():
            shard = by_name[name]
            code = dtype_name(shard.tensor.dtype, f"{section}/{name}")
            self.index[section][name] = TensorEntry(code, shard.shape, alias=target)

    def add_tree(self, stem: str, value: Any) -> None:
        """Plan a nested plain value: ``<stem>.json``, and ``<stem>.safetensors`` if it holds tensors."""
        document, tensors = tree.split(value, path=stem.partition("/")[0])
        self.blobs[f"{stem}.json"] = tree.to_json(document)
        if tensors:
            shards = [TensorShard.full(name, tensor) for name, tensor in tensors.items()]
            layout = lay_out_one(stem, f"{stem}.safetensors", shards)
            self.small.append(layout)
            self._add_to_index(stem, [layout])

    def _add_to_index(self, section: str, layouts: Sequence[Layout]) -> None:
        entries = self.index.setdefault(section, {})
        for layout in layouts:
            for shard, start in zip(layout.shards, layout.starts, strict=True):
                entry = ShardEntry(layout.path, len(layout.header) + start, shard.offsets, tuple(shard.tensor.shape))
                entries[shard.name] = TensorEntry(dtype_name(shard.tensor.dtype, shard.name), shard.shape, (entry,))


def agree_on_writers(
    name: str, tensors: Sections, topology: Topology, *, spread_sections: Collection[str], problem: str | None
) -> Writers:
    """Check on all ranks that a save can begin, and choose the rank that writes each plain tensor; a collective.

    Each disk gets every plain tensor from one of its ranks; those of ``spread_sections`` are spread over them.
    ``problem`` is what already keeps this rank from saving. Raises CheckpointError on every rank if one has a
    problem.
    """
    sizes: dict[str, dict[str, int]] = {}
    digest = ""
    try:
        _check_names(name, tensors)
        sizes = {s: {n: t.nbytes for n, t in named.items() if not is_dtensor(t)} for s, named in tensors.items()}
        digest = hash_bytes(repr(sorted((s, sorted(n.items())) for s, n in sizes.items())).encode())
    except (CheckpointError, AttributeError) as error:
        problem = problem or str(error)
    gathered = topology.ranks.gather((digest, problem))
    for _, other in gathered:
        if other is not None:
            raise CheckpointError(other)
    ranks = topology.disk_ranks
    if len({other for other, _ in gathered}) == 1:
        writers = {s: dict.fromkeys(named, ranks[0]) for s, named in sizes.items()}
        for section in set(spread_sections) & sizes.keys():
            slots = spread(sizes[section], len(ranks))
            writers[section] = {n: ranks[slot] for n, slot in slots.items()}
        return writers
    # some ranks hold what others do not: the first that holds a tensor writes it
    all_sizes = topology.ranks.gather(sizes)
    return {s: {n: rank for rank in reversed(ranks) for n in all_sizes[rank].get(s, {})} for s in sizes}


def _check_names(name: str, tensors: Sections) -> None:
    if not name or name.startswith(".") or "/" in name or "\\" in name or name == storage.POINTER:
        raise CheckpointError(f"{name!r} cannot be the name of a checkpoint")
    for section in tensors:
        if not _SECTION.fullmatch(section) or section in ("state", "rng"):
            raise CheckpointError(f"{section!r} cannot be the name of a section of tensors")
