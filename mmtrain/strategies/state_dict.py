"""The model's state by plain parameter name, for strategies whose parameters are the module's own."""

import torch
from torch import Tensor, nn


def module_state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, sharing the module's memory; other extra state is left out."""
    return {
        name: value
        for name, value in module.state_dict().items()
        if isinstance(value, Tensor) and name.rpartition(".")[2] != "_extra_state"
    }


def broadcast_buffers(module: nn.Module) -> None:
    """Copy rank 0's persistent buffers to all ranks; a collective."""
    kept = module.state_dict(keep_vars=True)
    for name, value in module.named_buffers():
        if name in kept:
            torch.distributed.broadcast(value, 0)
