"""What a section's plan depends on, and nothing else: names, types, shapes, strides and which tensors share memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from mmtrain.dtensor import is_dtensor, local_tensor


@dataclass(frozen=True, slots=True, eq=False)
class Facts:
    """The facts about a section's tensors, in the order of the mapping.

    ``kinds`` say what a tensor is, ``first`` is the position of the first tensor at the same address.
    """

    names: list[str]
    kinds: list[tuple[Any, ...]]
    first: list[int]

    def same_as(self, other: "Facts | None") -> bool:
        """Whether a plan made for the one holds for the other."""
        return (
            other is not None and self.names == other.names and self.first == other.first and self.kinds == other.kinds
        )


def look_at(tensors: Mapping[str, Tensor]) -> tuple[Facts, list[Tensor]] | None:
    """The facts, and this rank's part of each tensor; None for what is not a tensor in plain memory.

    This runs in every save for every tensor: 2 us each.
    """
    kinds: list[tuple[Any, ...]] = []
    first: list[int] = []
    parts: list[Tensor] = []
    positions: dict[int, int] = {}
    for position, tensor in enumerate(tensors.values()):
        local, placed = tensor, None
        if type(tensor) is not Tensor and type(tensor) is not Parameter:
            if not isinstance(tensor, Tensor):
                return None
            if is_dtensor(tensor):
                sharded: Any = tensor
                local = local_tensor(tensor).detach()
                placed = (sharded.placements, id(sharded.device_mesh), sharded.shape)
        if local.layout is not torch.strided:
            return None
        kinds.append((local.dtype, local.shape, local.stride(), local.device, local.is_conj(), local.is_neg(), placed))
        first.append(positions.setdefault(local.data_ptr(), position))
        parts.append(local)
    return Facts(list(tensors), kinds, first), parts
