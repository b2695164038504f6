"""Giving values to a model that was built without memory and sharded: one full parameter in memory at a time."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmtrain.dtensor import copy_from_full, is_dtensor, local_tensor
from mmtrain.errors import ConfigError

_RANDOM = {
    torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default, torch.ops.aten.random_.default,
    torch.ops.aten.random_.to, torch.ops.aten.random_.__getattr__("from"), torch.ops.aten.bernoulli_.float,
    torch.ops.aten.exponential_.default, torch.ops.aten.log_normal_.default, torch.ops.aten.cauchy_.default,
    torch.ops.aten.geometric_.default,
}  # fmt: skip


def initialise_blank(model: nn.Module, device: torch.device, ties: Sequence[Sequence[str]]) -> None:
    """Allocate the shards of a model on the meta device and run its ``init_weights()``.

    ``ties`` are the names of parameters that were one before. Raises ConfigError if the model has no
    ``init_weights``, or if that leaves a value unset.
    """
    init_weights = getattr(model, "init_weights", None)
    if not callable(init_weights):
        raise ConfigError(
            f"strategy.meta_init: {type(model).__name__} has no init_weights(), so a model built without memory would "
            "get no values; write one, or set meta_init=False"
        )
    model.to_empty(device=device)
    for first, *others in ties:
        for other in others:
            _put(model, other, model.get_parameter(first))
    with torch.no_grad():
        for value in [*model.parameters(), *model.buffers()]:
            if value.is_floating_point():
                local_tensor(value).fill_(float("nan"))
        # Whole numbers and truth values have no NaN: a buffer of them is blank where nothing has written into it.
        untouched = {name: (buffer, buffer._version) for name, buffer in model.named_buffers()}
        with _WholeDraws():
            init_weights()
    named = [*model.named_parameters(), *model.named_buffers()]
    blank = [name for name, value in named if value.is_floating_point() and bool(local_tensor(value).isnan().any())]
    for name, buffer in model.named_buffers():
        before, version = untouched.get(name, (None, 0))
        if buffer is before and buffer._version == version and not buffer.is_floating_point():
            blank.append(name)
    if blank:
        raise ConfigError(
            f"strategy.meta_init: {type(model).__name__}.init_weights() gives no value to {', '.join(blank[:5])}; "
            "give one there, or set meta_init=False"
        )


def _put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, last = name.rpartition(".")
    setattr(model.get_submodule(path), last, parameter)


class _WholeDraws(TorchDispatchMode):
    """Draws random values for a sharded tensor as for the full one, and keeps this rank's part.

    So every rank advances its generator equally, and the values do not depend on the number of ranks. The draws are
    made on the CPU for the same reason.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _RANDOM and is_dtensor(args[0]):
            target = args[0]
            copy_from_full(target, func(torch.empty(target.shape, dtype=target.dtype), *args[1:], **(kwargs or {})))
            return target
        return func(*args, **(kwargs or {}))
