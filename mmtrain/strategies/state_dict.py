"""The model's state by plain parameter name, for strategies whose parameters are the module's own."""

import torch
from torch import nn


def broadcast_buffers(module: nn.Module) -> None:
    """Copy rank 0's persistent buffers to all ranks; a collective."""
    kept = module.state_dict(keep_vars=True)
    for name, value in module.named_buffers():
        if name in kept:
            torch.distributed.broadcast(value, 0)
