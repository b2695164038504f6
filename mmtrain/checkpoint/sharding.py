"""Which part of which tensor this process writes, and which parts of a saved tensor a process needs.

A DTensor is written by the ranks that hold its shards, each box once. A plain tensor is written by one rank: rank 0,
unless its section is spread over ranks. Plain tensors need not be the same on every rank: DDP broadcasts rank 0's
buffers (running statistics) at the next forward, so rank 0's are the ones that count.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmtrain.checkpoint.format.index import ShardEntry
from mmtrain.dtensor import Box, is_dtensor, local_box, ranks_with_same_shard
from mmtrain.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class TensorShard:
    """What this process holds of the tensor ``name``: ``tensor``, at ``offsets`` of a full tensor of ``shape``."""

    name: str
    tensor: Tensor
    shape: tuple[int, ...]
    offsets: tuple[int, ...]

    @classmethod
    def full(cls, name: str, tensor: Tensor) -> "TensorShard":
        """A plain tensor as its only shard."""
        return cls(name, tensor, tuple(tensor.shape), (0,) * tensor.dim())

    @property
    def is_in_checkpoint(self) -> bool:
        """Whether there is anything to save: a rank may hold no element of a tensor that has some."""
        return self.tensor.numel() > 0 or 0 in self.shape


@dataclass(frozen=True, slots=True)
class LocalShards:
    """What this process holds of a section: the shards, which may be empty, and names of another name's memory.

    ``is_writer`` says of each shard whether this process writes it.
    """

    shards: list[TensorShard]
    is_writer: list[bool]
    aliases: dict[str, str]

    def written(self) -> list[TensorShard]:
        """The shards that this process writes."""
        return [
            shard
            for shard, is_writer in zip(self.shards, self.is_writer, strict=True)
            if is_writer and shard.is_in_checkpoint
        ]


def collect(section: str, tensors: Mapping[str, Tensor], *, writers: Mapping[str, int], rank: int) -> LocalShards:
    """Collect a section's tensors. ``writers`` has the rank that writes each plain tensor, rank 0 by default.

    Raises CheckpointError for what has no bytes to write (meta, sparse or quantized tensors, partial sums).
    """
    shards = []
    is_writer = []
    aliases = {}
    seen: dict[Any, str] = {}
    for name in sorted(tensors):
        shard, is_first_copy = _shard(section, name, tensors[name], rank)
        identity = _memory(shard)
        if identity is not None and identity in seen:
            aliases[name] = seen[identity]
            is_first_copy = False
        elif identity is not None:
            seen[identity] = name
        shards.append(shard)
        is_writer.append(is_first_copy and (is_dtensor(tensors[name]) or writers.get(name, 0) == rank))
    return LocalShards(shards, is_writer, aliases)


def spread(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Give each name to a rank so that all write about as many bytes; the same answer on every rank."""
    load = [0] * ranks
    writers = {}
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        writers[name] = load.index(min(load))
        load[writers[name]] += sizes[name]
    return writers


def overlap(wanted: Box, shard: ShardEntry) -> Box | None:
    """The box that ``wanted`` and ``shard`` share, in coordinates of the full tensor; None if there is none."""
    low = tuple(max(a, b) for a, b in zip(wanted[0], shard.offsets, strict=True))
    high = tuple(min(a + n, b + m) for a, n, b, m in zip(*wanted, shard.offsets, shard.shape, strict=True))
    shape = tuple(end - start for start, end in zip(low, high, strict=True))
    if any(length <= 0 for length in shape):
        return None
    return low, shape


def _shard(section: str, name: str, tensor: Tensor, rank: int) -> tuple[TensorShard, bool]:
    """This rank's shard, and whether no lower rank holds the same one."""
    where = f"{section}/{name}"
    if not isinstance(tensor, Tensor):
        raise CheckpointError(
            f"{where}: expected a tensor, found a {type(tensor).__name__}; plain values go to `state`"
        )
    sharded: Any = tensor
    is_first_copy = True
    if is_dtensor(tensor):
        if any(placement.is_partial() for placement in sharded.placements):
            raise CheckpointError(
                f"{where}: a sum over ranks that is still pending (a Partial placement) cannot be saved"
            )
        is_first_copy = ranks_with_same_shard(tensor)[:1] == [rank]
    local, (offsets, _) = local_box(tensor)
    if local.is_meta or local.layout is not torch.strided or local.is_quantized:
        raise CheckpointError(
            f"{where}: a tensor with layout {local.layout} on device {local.device} has no bytes to save"
        )
    return TensorShard(name, local, tuple(tensor.shape), offsets), is_first_copy


def _memory(shard: TensorShard) -> Any:
    """What identifies the shard's memory; None if it has none."""
    t = shard.tensor
    if t.numel() == 0:
        return None
    return (t.data_ptr(), t.device, tuple(t.shape), t.stride(), t.dtype, t.is_conj(), t.is_neg(), shard.offsets)
