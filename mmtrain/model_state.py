"""A model's state by name: what a checkpoint holds of it, and how it gets that back.

The state belongs to the modules. It is read with ``state_dict()`` and put back with ``load_state_dict()``, so a module
that overrides torch's ``_save_to_state_dict`` and ``_load_from_state_dict``, or has an extra state, keeps there what it
likes. Most entries are the very parameters and buffers of the model; their saved values are read straight into their
memory, and ``load_state_dict()`` then finds them in place.
"""

from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from mmtrain.dtensor import is_dtensor
from mmtrain.errors import CheckpointError

_EXTRA = "_extra_state"


def tensors_of(module: nn.Module, *, keep_vars: bool = False) -> dict[str, Tensor]:
    """The entries of the state that are plain tensors (dense, perhaps sharded): parameters and persistent buffers,
    which share the module's memory, and what modules compute for their state. With ``keep_vars`` the very parameters.
    """
    return {n: value for n, value in module.state_dict(keep_vars=keep_vars).items() if _is_plain(n, value)}


def others_of(module: nn.Module) -> dict[str, Any]:
    """The other entries of the state: extra states, plain values, sparse tensors."""
    if not any(_may_have_others(part) for part in module.modules()):
        return {}  # most models; their state is collected once a save, not twice
    return {name: value for name, value in module.state_dict().items() if not _is_plain(name, value)}


def own_entries(module: nn.Module) -> dict[str, Any]:
    """The entries that are not the module's parameters and buffers, which ranks may hold differently.

    What is sharded belongs to all ranks and is left out.
    """
    if not any(_may_have_others(part) for part in module.modules()):
        return {}
    own = _own_tensors(module)
    entries: dict[str, Any] = module.state_dict(keep_vars=True)
    return {name: value for name, value in entries.items() if own.get(name) is not value and not _has_dtensor(value)}


def _may_have_others(part: nn.Module) -> bool:
    kind, plain = type(part), nn.Module
    return bool(
        kind._save_to_state_dict is not plain._save_to_state_dict
        or kind.state_dict is not plain.state_dict
        or kind.get_extra_state is not plain.get_extra_state
        or part._state_dict_hooks
        or any(buffer is not None and buffer.layout is not torch.strided for buffer in part._buffers.values())
    )


def _has_dtensor(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return any(_has_dtensor(item) for item in value)
    return is_dtensor(value)


def _is_plain(name: str, value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and name.rpartition(".")[2] != _EXTRA


def targets(module: nn.Module, saved: Mapping[str, tuple[Iterable[int], torch.dtype]]) -> dict[str, Tensor]:
    """Memory for saved tensors (by name: shape and type), to be filled and given to `load`.

    It is the module's own memory where there is any, whatever its shape; the caller compares. A saved name that no
    module has a place for is left out.
    """
    state: dict[str, Any] = module.state_dict(keep_vars=True)
    own = _own_tensors(module)
    kept = [name for name in own if state.get(name) is own[name]]
    found = {name: own[name] for name in kept if _is_plain(name, own[name])}
    for name, (size, dtype) in saved.items():
        current: Any = state.get(name)
        shape = tuple(size)
        if name in found:
            if tuple(found[name].shape) == shape and _overlaps(found[name]):
                found[name] = torch.empty(shape, dtype=found[name].dtype, device=found[name].device)
        elif is_dtensor(current) and current.shape == shape:
            found[name] = torch.empty_like(current, requires_grad=False)
        elif isinstance(current, Tensor) or (current is None and _has_own_state(module, name)):
            found[name] = torch.empty(shape, dtype=dtype, device=getattr(current, "device", _device(module)))
    return found


@torch.no_grad()
def load(module: nn.Module, values: Mapping[str, Any]) -> None:
    """Put back entries of a state: filled `targets`, and what `others_of` gave. What is missing stays as it is.

    Raises CheckpointError for an entry that no module takes, and where a module refuses its own.
    """
    own = _own_tensors(module)
    state: Any = module.state_dict()  # for its metadata, the versions of modules' states
    state.clear()
    unset = {name for name, buffer in _buffers(module) if buffer is None}
    for name, value in values.items():
        if isinstance(value, Tensor) and name in unset:
            set_buffer(module, name, value.to(_device(module)))
            state[name] = module.get_buffer(name)
        elif isinstance(value, Tensor) and name in own and value is not own[name]:
            state[name] = _put(module, name, own[name], value)
        else:
            state[name] = value
    try:
        result = module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"the model cannot take its saved state: {' '.join(str(error).split())}") from error
    if result.unexpected_keys:
        names = ", ".join(result.unexpected_keys[:5])
        raise CheckpointError(f"the saved state of the model has {names}, which this model does not have a place for")


def _put(module: nn.Module, name: str, current: Tensor, value: Tensor) -> Tensor:
    """Put a value into a parameter or buffer that torch could not copy it into; returns what `load` then passes on."""
    if _overlaps(current):
        one = _first_of_repeated(current)
        given = _first_of_repeated(value, like=current)
        if not _overlaps(one) and torch.equal(given.expand_as(value), value):
            one.copy_(given)
            return current
    elif current.layout is torch.strided and value.layout is torch.strided:
        return value
    if isinstance(current, nn.Parameter):
        raise CheckpointError(f"the saved value of {name} does not fit this model, where its elements share memory")
    set_buffer(module, name, value.to(current.device))
    return module.get_buffer(name)


def broadcast_buffers(module: nn.Module) -> None:
    """Copy rank 0's persistent buffers to all ranks; a collective."""
    kept = module.state_dict(keep_vars=True)
    for name, value in module.named_buffers():
        if name in kept:
            torch.distributed.broadcast(value, 0)


# ---- buffers that change their shape -----------------------------------------------------------------------------
Kind = tuple[tuple[int, ...], torch.dtype] | None


def buffer_kinds(module: nn.Module) -> dict[str, Kind]:
    """Shape and type of each dense persistent buffer; None for one that is registered and has no value."""
    return {
        name: None if value is None else (tuple(value.shape), value.dtype)
        for name, value in _buffers(module, persistent=True)
        if value is None or value.layout is torch.strided
    }


def changed_kinds(before: Mapping[str, Kind], now: Mapping[str, Kind]) -> dict[str, Kind]:
    """The kinds of ``now`` that are not those of ``before``; None for a buffer that has gone."""
    names = dict.fromkeys([*before, *now])
    return {name: now.get(name) for name in names if now.get(name) != before.get(name)}


def set_buffer(module: nn.Module, name: str, value: Tensor | None) -> None:
    """Give a buffer another tensor, or none."""
    path, _, last = name.rpartition(".")
    setattr(module.get_submodule(path), last, value)


def reshape_buffers(module: nn.Module, kinds: Mapping[str, Kind]) -> None:
    """Give buffers memory of these kinds, to be loaded into. Raises CheckpointError for a name that is not a buffer."""
    buffers, known = dict(_buffers(module)), buffer_kinds(module)
    for name, kind in kinds.items():
        if name not in buffers:
            raise CheckpointError(f"the checkpoint has a buffer {name}, which this model does not have")
        if name not in known or known[name] != kind:
            current = buffers[name]
            device = _device(module) if current is None else current.device
            set_buffer(module, name, None if kind is None else torch.empty(kind[0], dtype=kind[1], device=device))


# ---- what the functions above ask ----------------------------------------------------------------------------------
def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    parameters = module.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(module.named_buffers(remove_duplicate=False))}


def _buffers(module: nn.Module, *, persistent: bool = False) -> Iterator[tuple[str, Tensor | None]]:
    """All buffers, also those that are registered and have no value, which torch's `named_buffers` leaves out."""
    for prefix, part in module.named_modules(remove_duplicate=False):
        for last, value in part._buffers.items():
            if not (persistent and last in part._non_persistent_buffers_set):
                yield f"{prefix}.{last}" if prefix else last, value


def _device(module: nn.Module) -> torch.device:
    return next((value.device for value in _own_tensors(module).values()), torch.device("cpu"))


def _has_own_state(module: nn.Module, name: str) -> bool:
    """Whether a module on the way to ``name`` loads its state in its own way, and so may know this entry."""
    parts = name.split(".")[:-1]
    plain = nn.Module
    while True:
        kind = type(module)
        if (kind._load_from_state_dict, kind.load_state_dict) != (plain._load_from_state_dict, plain.load_state_dict):
            return True
        following = getattr(module, parts.pop(0), None) if parts else None
        if not isinstance(following, nn.Module):
            return False
        module = following


def _overlaps(tensor: Tensor) -> bool:
    """Whether several elements may share memory, as those of ``expand()`` and ``unfold()`` do."""
    if tensor.layout is not torch.strided or is_dtensor(tensor) or tensor.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return prod(tensor.shape) > 0
        reach += stride * (size - 1)
    return False


def _first_of_repeated(tensor: Tensor, *, like: Tensor | None = None) -> Tensor:
    """The first of the elements that ``expand()`` has repeated; ``like`` says along which dimensions."""
    for dimension, stride in enumerate((tensor if like is None else like).stride()):
        if stride == 0:
            tensor = tensor.narrow(dimension, 0, 1)
    return tensor
