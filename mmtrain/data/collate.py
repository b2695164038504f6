"""Collate functions: from a list of samples to a batch."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate as torch_default_collate

from mmtrain.errors import ConfigError
from mmtrain.registry import FUNCTIONS, resolve

Collate = Callable[[list[Any]], Any]


@FUNCTIONS.register_module()
def default_collate(data_batch: Sequence[Any]) -> Any:
    """Stack as MMEngine's ``default_collate`` does: like torch's, but ``BaseDataElement`` objects stay in lists."""
    from mmengine.dataset import default_collate as collate

    return collate(data_batch)


@FUNCTIONS.register_module()
def pseudo_collate(data_batch: Sequence[Any]) -> Any:
    """Group as MMEngine's ``pseudo_collate`` does: the samples' structure with lists inside; nothing is stacked."""
    from mmengine.dataset import pseudo_collate as collate

    return collate(data_batch)


@FUNCTIONS.register_module()
def pad_collate(data_batch: Sequence[Any], pad_value: Any = 0, keys: Sequence[str] | None = None) -> Any:
    """Stack samples whose arrays differ in size. Every dimension is padded at its end to the largest in the batch.

    Args:
        data_batch: samples: tensors, or mappings or sequences of what torch's ``default_collate`` takes.
        pad_value: a number, or for mappings a dict from key to number, in which ``'default'`` is for all other keys (0
            if absent).
        keys: for mappings: the only keys that may be padded; None pads all whose sizes differ.
    """
    first = data_batch[0]
    if isinstance(first, Mapping):
        values = pad_value if isinstance(pad_value, Mapping) else {"default": pad_value}
        return {
            key: (_pad_stack if keys is None or key in keys else _stack)(
                [sample[key] for sample in data_batch], values.get(key, values.get("default", 0))
            )
            for key in first
        }
    if isinstance(first, tuple):
        return tuple(_pad_stack(list(column), pad_value) for column in zip(*data_batch, strict=True))
    return _pad_stack(list(data_batch), pad_value)


def _stack(values: list[Any], pad_value: Any) -> Any:
    return torch_default_collate(values)


def _pad_stack(values: list[Any], pad_value: Any) -> Any:
    if not all(isinstance(value, torch.Tensor | np.ndarray | list) for value in values):
        return torch_default_collate(values)
    tensors = [torch.as_tensor(value) for value in values]
    shapes = {tensor.shape for tensor in tensors}
    if len(shapes) == 1:
        return torch_default_collate(tensors)
    largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    batch = tensors[0].new_full((len(tensors), *largest), pad_value)
    for row, tensor in zip(batch, tensors, strict=True):
        row[tuple(slice(size) for size in tensor.shape)] = tensor
    return batch


def resolve_collate(collate_fn: Any, *, path: str) -> Collate:
    """Return the function that a config's ``collate_fn`` means.

    None is torch's ``default_collate``, which stacks. (MMEngine's default is ``pseudo_collate``, which does not: name
    it for MMEngine datasets.) A name is looked up in ``FUNCTIONS``: ``'default_collate'`` and ``'pseudo_collate'`` are
    MMEngine's, ``'pad_collate'`` is mmtrain's. A dict has ``type`` and the other arguments of the function, or of the
    class to instantiate. A function is used as it is.

    Raises:
        ConfigError: the name is unknown, or the object is not callable.
    """
    if collate_fn is None:
        return torch_default_collate
    if isinstance(collate_fn, str):
        collate_fn = {"type": collate_fn}
    if not isinstance(collate_fn, Mapping):
        if not callable(collate_fn):
            raise ConfigError(f"{path}: found {collate_fn!r}, expected a function, a name, or a dict with 'type'")
        return collate_fn  # type: ignore[no-any-return]
    arguments = {key: value for key, value in collate_fn.items() if key != "type"}
    if "type" not in collate_fn:
        raise ConfigError(f"{path}.type: missing, expected the name of a collate function, such as 'default_collate'")
    target = resolve(FUNCTIONS, collate_fn["type"], path=path)
    if isinstance(target, type):
        return target(**arguments)  # type: ignore[no-any-return]
    return partial(target, **arguments) if arguments else target


def is_built_in(collate: Any) -> bool:
    """Return whether a collate function is torch's or one of those above, none of which accepts None as a sample."""
    function = collate.func if isinstance(collate, partial) else collate
    return function in (torch_default_collate, default_collate, pseudo_collate, pad_collate)
