"""Which part of which tensor this process writes, and which parts of a saved tensor a process needs.

A sharded tensor (DTensor, as FSDP2 and tensor parallelism make them) is written by the ranks that hold its shards, each
box once. A whole tensor is written by one rank; rank 0 unless its section is spread, because whole tensors need not be
the same on every rank: DDP broadcasts rank 0's buffers (running statistics) at the next forward, so rank 0's are the
ones that rule.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmtrain.checkpoint.format.index import PieceEntry
from mmtrain.dtensor import Box, is_dtensor, local_box, ranks_with_same_shard
from mmtrain.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of the tensor ``name`` that this process holds: ``tensor`` lies at ``offsets`` of a whole of ``shape``."""

    name: str
    tensor: Tensor
    shape: tuple[int, ...]
    offsets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Held:
    """What this process holds of a section: the pieces, which may be empty, and names that are another name's memory.

    ``writes`` says of each piece whether this process is the one that writes it.
    """

    pieces: list[Piece]
    writes: list[bool]
    aliases: dict[str, str]


def collect(section: str, tensors: Mapping[str, Tensor], *, writers: Mapping[str, int], rank: int) -> Held:
    """Look over a section's tensors. ``writers`` names the rank that writes each whole tensor; rank 0 where it is
    silent.

    Raises CheckpointError for what has no bytes of its own to write (meta, sparse or quantized tensors, partial sums).
    """
    pieces, writes, aliases = [], [], {}
    seen: dict[Any, str] = {}
    for name in sorted(tensors):
        piece, first_copy = _piece(section, name, tensors[name], rank)
        identity = _memory(piece)
        if identity is not None and identity in seen:
            aliases[name] = seen[identity]
            first_copy = False
        elif identity is not None:
            seen[identity] = name
        sharded = is_dtensor(tensors[name])
        pieces.append(piece)
        writes.append(first_copy and (sharded or writers.get(name, 0) == rank))
    return Held(pieces, writes, aliases)


def spread(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Give each name to a rank so that all write about as many bytes; the same answer on every rank."""
    load = [0] * ranks
    writers = {}
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        writers[name] = load.index(min(load))
        load[writers[name]] += sizes[name]
    return writers


def overlap(wanted: Box, piece: PieceEntry) -> Box | None:
    """The box that ``wanted`` and ``piece`` share, in coordinates of the whole tensor; None where there is none."""
    low = tuple(max(a, b) for a, b in zip(wanted[0], piece.offsets, strict=True))
    high = tuple(min(a + n, b + m) for a, n, b, m in zip(wanted[0], wanted[1], piece.offsets, piece.shape, strict=True))
    shape = tuple(end - start for start, end in zip(low, high, strict=True))
    if any(length <= 0 for length in shape):
        return None
    return low, shape


def _piece(section: str, name: str, tensor: Tensor, rank: int) -> tuple[Piece, bool]:
    where = f"{section}/{name}"
    if not isinstance(tensor, Tensor):
        raise CheckpointError(
            f"{where}: a {type(tensor).__name__} where a tensor was expected; plain values go to `state`"
        )
    sharded: Any = tensor
    first_copy = True
    if is_dtensor(tensor):
        if any(placement.is_partial() for placement in sharded.placements):
            raise CheckpointError(
                f"{where}: a sum over ranks that is still pending (a Partial placement) cannot be saved"
            )
        first_copy = ranks_with_same_shard(tensor)[:1] == [rank]
    local, (offsets, _) = local_box(tensor)
    if local.is_meta or local.layout is not torch.strided or local.is_quantized:
        raise CheckpointError(
            f"{where}: a tensor with layout {local.layout} on device {local.device} has no bytes to save"
        )
    return Piece(name, local, tuple(tensor.shape), offsets), first_copy


def _memory(piece: Piece) -> Any:
    t = piece.tensor
    if t.numel() == 0:
        return None
    return (t.data_ptr(), t.device, tuple(t.shape), t.stride(), t.dtype, t.is_conj(), t.is_neg(), piece.offsets)
