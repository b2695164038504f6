"""Inputs of a model that runs in half precision."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def cast_inputs(model: nn.Module, chosen: Sequence[int | str], dtype: torch.dtype) -> None:
    """Give ``model`` its chosen inputs, by name or position, in ``dtype``; integers stay integers."""
    places = set(chosen)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        cast_args = tuple(_cast(value, dtype) if index in places else value for index, value in enumerate(args))
        return cast_args, {key: _cast(value, dtype) if key in places else value for key, value in kwargs.items()}

    model.register_forward_pre_hook(before, with_kwargs=True)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _cast(item, dtype) for key, item in value.items()}
    return type(value)(_cast(item, dtype) for item in value) if isinstance(value, (list, tuple)) else value
