"""Sharded values put together: the whole model's weights, and nested state."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mmtrain import dist
from mmtrain.strategies import Strategy


def gather_weights(strategy: Strategy) -> dict[str, Tensor]:
    """The whole model's tensors by name, on rank 0 (where sharded on the CPU, one at a time); empty elsewhere."""
    weights = {}
    for name, value in strategy.model_state().items():
        gathered = whole(value)
        if dist.is_main():
            weights[name] = gathered if gathered is value else gathered.cpu()
    return weights


def whole(value: Any) -> Any:
    """The same nested state with sharded tensors (averages of the weights) put together; a collective."""
    if isinstance(value, Mapping):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value):
        return type(value)(whole(item) for item in value)
    full_tensor = getattr(value, "full_tensor", None)
    return value if full_tensor is None else full_tensor()
