"""Whether checkpoints can hold a model's whole state: asked before training starts, not at the first save."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mmtrain import dist
from mmtrain.checkpoint.format import tree
from mmtrain.checkpoint.format.tensors import dtype_name
from mmtrain.errors import CheckpointError, ConfigError


def check_savable(model: nn.Module) -> None:
    """Raise ConfigError that names the first entry of the model's state that no checkpoint could hold or give back."""
    for name, module in model.named_modules():
        kind = type(module)
        own = kind.get_extra_state is not nn.Module.get_extra_state
        if own and kind.set_extra_state is nn.Module.set_extra_state:
            raise ConfigError(
                f"model: {name or 'the model'} ({kind.__name__}) has get_extra_state() but not set_extra_state(), so a "
                "resume could not restore its state; write one"
            )
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(value):
            raise ConfigError(
                f"model: {name} has no shape before the first forward (a lazy module), so neither an optimizer nor a "
                "checkpoint can hold it; run the model once at the end of its __init__, or give the layer its sizes"
            )
    for name, value in model.state_dict().items():
        reason = _reason(name, value)
        if reason:
            raise ConfigError(
                f"model: {name} is {reason}, which a checkpoint cannot hold; keep it out of the state "
                "(register_buffer(..., persistent=False)) if it need not be saved, or keep it as plain tensors"
            )


def _reason(name: str, value: Any) -> str:
    """Why a value cannot be saved; an empty string if it can."""
    try:
        if not isinstance(value, Tensor):
            tree.split(value, path=name)
            return ""
        dtype_name(value.dtype, name)
    except CheckpointError as error:
        return f"a {type(value).__name__} ({error})"
    if hasattr(value, "__tensor_flatten__"):  # a subclass that wraps other tensors
        return f"a {type(value).__name__}"
    if value.is_quantized:
        return f"a quantized tensor of type {value.dtype}"
    shared = value.layout is not torch.strided and dist.world_size() > 1
    return "a sparse tensor, which several processes cannot share" if shared else ""
