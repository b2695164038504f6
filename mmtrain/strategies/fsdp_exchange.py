"""The collectives of FSDP2, each announced to a `Lockstep` before it communicates.

They are those that FSDP2 uses by default (``DefaultAllGather`` and ``DefaultReduceScatter`` in torch).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmtrain.strategies.lockstep import Lockstep

# Newer versions of torch have other names for them.
_all_gather = getattr(torch.distributed, "all_gather_single", None) or torch.distributed.all_gather_into_tensor
_reduce_scatter = getattr(torch.distributed, "reduce_scatter_single", None) or torch.distributed.reduce_scatter_tensor


def announce_exchanges(model: nn.Module, lockstep: Lockstep) -> None:
    """Let each collective of a sharded model be a step of ``lockstep``.

    Older versions of torch have no such setting; there only the gradients of whole updates are compared.
    """
    from torch.distributed.fsdp import FSDPModule

    lockstep.watch_forwards(model)
    if not hasattr(FSDPModule, "set_custom_all_gather"):
        return
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule):
            gather: Any = _Gather(lockstep, name or "the model")
            reduce: Any = _Reduce(lockstep, name or "the model")
            module.set_custom_all_gather(gather)
            module.set_custom_reduce_scatter(reduce)


class _Comm:
    """The memory of a collective: torch's interface for one of a user's own."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _Gather(_Comm):
    def __init__(self, lockstep: Lockstep, name: str) -> None:
        self._lockstep = lockstep
        self._forward = lockstep.declare("entered", name)
        self._backward = lockstep.declare("came to the backward of", name, in_backward=True)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        number = self._backward if self._lockstep.in_backward else self._forward
        self._lockstep.step(number)
        if self._lockstep.is_apart:
            return None
        return _all_gather(output_tensor, input_tensor, group=group, async_op=async_op)


class _Reduce(_Comm):
    def __init__(self, lockstep: Lockstep, name: str) -> None:
        self._lockstep = lockstep
        self._number = lockstep.declare("had gradients of", name, in_backward=True)

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        # Here, because a mesh that repeats the model on each rank has no reduce-scatter, only an all-reduce after this.
        self._lockstep.step(self._number, math.prod(size))
        return super().allocate(size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        if self._lockstep.is_apart:
            return None
        return _reduce_scatter(output_tensor, input_tensor, group=group, op=op, async_op=async_op)
