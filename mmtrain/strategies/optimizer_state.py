"""An optimizer's state by parameter name, through its own ``state_dict()`` and ``load_state_dict()``.

torch's contract (https://docs.pytorch.org/docs/stable/generated/torch.optim.Optimizer.state_dict.html) numbers the
parameters in the order of the groups. Here numbers become names, so that another strategy, or a config with other
groups, finds them again. Everything that is not a tensor of a parameter is kept as plain values beside the tensors.
The values of the groups (``lr``, ``betas``, counters) are the subject of `mmtrain.optim.group_values`.
"""

import warnings
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mmtrain.checkpoint.format.tensors import DTYPES
from mmtrain.checkpoint.format.tree import split
from mmtrain.dtensor import is_dtensor, mesh_of
from mmtrain.errors import CheckpointError, ConfigError
from mmtrain.optim import OptimWrapper
from mmtrain.optim.fusing import is_dense
from mmtrain.strategies.base import OptimizerState, SavedTensor

_IN_SECTION = "$section"  # {"$section": name}: a tensor inside a container, which is saved in the section of tensors
_PARAMETER = "$parameter"  # ("$parameter", name): a parameter as the key of a dict
_STRIDES = "$strides"
_KEYS = ("state", "param_groups")


def capture(model: nn.Module, optim: OptimWrapper) -> OptimizerState:
    """The state of every optimizer; tensors share its memory.

    Raises ConfigError for a parameter that two optimizers train, or that is not one of the model's.
    """
    names = _names(model, optim)
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {key: _Capture(names, tensors, key).of(one) for key, one in optim.optimizers.items()}
    return OptimizerState(tensors, values | _strides(model, tensors))


def restore(model: nn.Module, optim: OptimWrapper, state: OptimizerState) -> None:
    """Give the optimizers what `capture` returned, or what an earlier version saved (``values`` is None).

    The optimizers keep the tensors. Raises CheckpointError for state of a parameter that this run does not train, and
    for state that the optimizer's ``load_state_dict`` refuses.
    """
    names = _names(model, optim)
    state = _with_strides(state)
    trained = set(names.values())
    for key in state.tensors:
        name = parameter_of(key)
        if name is not None and name not in trained:
            raise not_trained(name)
    for key, optimizer in optim.optimizers.items():
        _Restore(names, state, key, optimizer).load()


def check(model: nn.Module, optim: OptimWrapper, state: OptimizerState) -> None:
    """Raise ConfigError if a checkpoint could not hold ``state``, which `capture` gave, or a resume not restore it."""
    parameters = dict(model.named_parameters())
    for key, tensor in state.tensors.items():
        fault = _fault(tensor, parameters.get(parameter_of(key) or ""))
        if fault:
            raise _cannot_be_saved(optim, f"{key} is {fault}")
    try:
        split(state.values, path="optimizer")
    except CheckpointError as error:
        raise _cannot_be_saved(optim, str(error).replace("..", ".", 1)) from error


def optimizer_targets(model: nn.Module, saved: Mapping[str, SavedTensor]) -> dict[str, Tensor]:
    """Memory for saved tensors. One with its parameter's shape gets the parameter's device, strides and sharding.

    Fused and foreach kernels walk over a parameter and its moments by address, so their strides must be equal.
    """
    parameters = dict(model.named_parameters())
    targets: dict[str, Tensor] = {}
    for key, tensor in saved.items():
        parameter = parameters.get(parameter_of(key) or "")
        if parameter is not None and parameter.shape == tensor.shape and tensor.shape:
            targets[key] = torch.empty_like(parameter.detach(), dtype=tensor.dtype)
        else:
            targets[key] = torch.empty(tensor.shape, dtype=tensor.dtype)
    return targets


@torch.no_grad()
def align(optim: OptimWrapper) -> None:
    """Give moments the strides of their parameters, where a fused kernel updates them.

    To be called after hooks that may change a model's memory format: the kernel does not look at strides.
    """
    groups = [(one.state, group) for one in optim.optimizers.values() for group in one.param_groups]
    for state, group in groups:
        for parameter in group["params"] if group.get("fused") else ():
            slots = state.get(parameter, {})
            for slot, value in slots.items():
                is_moment = isinstance(value, Tensor) and value.shape == parameter.shape and not is_dtensor(value)
                if is_moment and value.stride() != parameter.stride():
                    slots[slot] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def parameter_of(key: str) -> str | None:
    """The parameter that a tensor ``<parameter>/<slot>`` belongs to; None for state of the optimizer itself."""
    name, _, _ = key.rpartition("/")
    return name if name and not name.startswith("~") else None


def not_trained(name: str) -> CheckpointError:
    """The error of a checkpoint that holds optimizer state for a parameter that this run does not train."""
    return CheckpointError(
        f"the checkpoint holds optimizer state for {name!r}, which this run does not train; "
        "start from its weights alone (resume=False, load_from=...) or train the same parameters"
    )


def placed(slot: str, value: Tensor, parameter: Tensor, optimizer: Optimizer) -> Tensor | float:
    """A tensor that stands for itself or, in checkpoints of earlier versions, for a number (0-d, float64)."""
    has_such_moments = parameter.dim() == 0 and parameter.dtype == torch.float64
    if value.dim() == 0 and value.dtype == torch.float64 and (slot == "step" or not has_such_moments):
        return value.item()
    return _beside(slot, value, parameter, optimizer)


def _beside(slot: str, value: Tensor, parameter: Tensor, optimizer: Optimizer) -> Tensor:
    if slot == "step" and not any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups):
        return value.cpu()  # torch keeps step counts on the CPU unless a fused kernel reads them
    return value.to(parameter.device)


def _names(model: nn.Module, optim: OptimWrapper) -> dict[int, str]:
    """The name of each trained parameter by its id."""
    names = {id(parameter): name for name, parameter in reversed(list(model.named_parameters()))}
    found: dict[int, str] = {}
    for optimizer in optim.optimizers.values():
        for parameter in _parameters(optimizer):
            if id(parameter) not in names:
                raise ConfigError(
                    f"optim_wrapper: {type(optimizer).__name__} trains a parameter of shape {tuple(parameter.shape)} "
                    "that is not a parameter of the model, so no checkpoint would hold it; make it one of the model's"
                )
            if id(parameter) in found:
                raise ConfigError(
                    f"optim_wrapper: {names[id(parameter)]} is trained by two optimizers, whose moments a checkpoint "
                    "could not tell apart; give it to one of them"
                )
            found[id(parameter)] = names[id(parameter)]
    return found


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    """The parameters in the order in which torch numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _is_torch_like(packed: Any, count: int) -> bool:
    """Whether a ``state_dict()`` has torch's form: state by number, groups with numbers from 0 to ``count`` - 1."""
    if not isinstance(packed, Mapping) or not isinstance(packed.get("state"), Mapping):
        return False
    groups = packed.get("param_groups")
    if not isinstance(groups, list):
        return False
    return [number for group in groups for number in group.get("params", ())] == list(range(count))


def _strides(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, list[int]]]:
    """``{"$strides": ..}`` of the tensors whose strides are not those that `optimizer_targets` gives.

    They decide how a product of matrices is rounded (the result of a QR decomposition is column-major).
    """
    parameters = dict(model.named_parameters())
    found = {}
    for key, tensor in tensors.items():
        if is_dtensor(tensor) or tensor.layout is not torch.strided:
            continue
        parameter = parameters.get(parameter_of(key) or "")
        if parameter is not None and parameter.shape == tensor.shape:
            has_default = parameter.stride() == tensor.stride()
        else:
            has_default = tensor.is_contiguous()
        if not has_default and is_dense(tensor):
            found[key] = list(tensor.stride())
    return {_STRIDES: found} if found else {}


def _with_strides(state: OptimizerState) -> OptimizerState:
    strides = (state.values or {}).get(_STRIDES, {})
    tensors = dict(state.tensors)
    for key, stride in strides.items():
        if key in tensors and not is_dtensor(tensors[key]):
            plain = tensors[key]
            tensors[key] = torch.empty_strided(plain.shape, stride, dtype=plain.dtype, device=plain.device).copy_(plain)
    return OptimizerState(tensors, state.values)


class _Capture:
    """Takes one optimizer's ``state_dict()`` apart into tensors by name and plain values.

    Values: ``order`` (names by number), and for torch's form ``state`` (of each parameter, what is not a tensor),
    ``other_state`` (entries of ``state`` that belong to no parameter) and ``extra`` (further keys of the dict); for
    any other form ``whole``.
    """

    def __init__(self, names: Mapping[int, str], tensors: dict[str, Tensor], key: str) -> None:
        self._names = names
        self._tensors = tensors
        self._prefix = f"~{key}"

    def of(self, optimizer: Optimizer) -> dict[str, Any]:
        order = [self._names[id(parameter)] for parameter in _parameters(optimizer)]
        packed = optimizer.state_dict()
        values: dict[str, Any] = {"order": order}
        if not _is_torch_like(packed, len(order)):
            return values | {"whole": self._plain(packed, f"{self._prefix}/#")}
        state: dict[str, Any] = {}
        other: list[Any] = []
        for number, slots in packed["state"].items():
            if isinstance(number, int) and number < len(order) and isinstance(slots, Mapping):
                rest = self._slots(order[number], slots)
                if rest:
                    state[order[number]] = rest
            else:
                other.append((number, self._plain(slots, f"{self._prefix}/#state.{number}")))
        extra = {name: self._plain(packed[name], f"{self._prefix}/#{name}") for name in packed if name not in _KEYS}
        return values | {"state": state, "other_state": other, "extra": extra}

    def _slots(self, name: str, slots: Mapping[Any, Any]) -> dict[Any, Any]:
        """Put a parameter's tensors among the tensors; returns its other values."""
        rest = {}
        for slot, value in slots.items():
            if isinstance(value, Tensor) and isinstance(slot, str) and "/" not in slot and "#" not in slot:
                self._tensors[f"{name}/{slot}"] = value
            else:
                rest[slot] = self._plain(value, f"{name}/#{slot}")
        return rest

    def _plain(self, value: Any, path: str) -> Any:
        """The same value with a reference in the place of each tensor; ``path`` names the tensor of this value."""
        if isinstance(value, Tensor):
            stem, _, rest = path.partition("/#")
            key = f"{stem}/#{rest.replace('/', '|')}"
            while key in self._tensors:
                key += "~"
            self._tensors[key] = value
            return {_IN_SECTION: key}
        if isinstance(value, Mapping):
            return {self._key(key): self._plain(item, f"{path}.{self._label(key)}") for key, item in value.items()}
        number = iter(range(1 << 62))
        return _rebuilt(value, lambda item: self._plain(item, f"{path}.{next(number)}"))

    def _label(self, key: Any) -> str:
        return self._names.get(id(key), "tensor") if isinstance(key, Tensor) else str(key)

    def _key(self, key: Any) -> Any:
        return (_PARAMETER, self._names[id(key)]) if isinstance(key, Tensor) and id(key) in self._names else key


class _Restore:
    """Puts one optimizer's state together again and gives it to ``load_state_dict()``."""

    def __init__(self, names: Mapping[int, str], state: OptimizerState, key: str, optimizer: Optimizer) -> None:
        self._parameters = _parameters(optimizer)
        self._order = [names[id(parameter)] for parameter in self._parameters]
        self._number = {name: number for number, name in enumerate(self._order)}
        self._tensors = state.tensors
        self._values = None if state.values is None else state.values.get(key, {})
        self._optimizer = optimizer

    def load(self) -> None:
        packed = self._optimizer.state_dict()
        if self._values is not None and "whole" in self._values:
            self._load(self._whole(self._values))
            return
        if not _is_torch_like(packed, len(self._order)):
            raise self._refused("its state_dict() has another form than the one in the checkpoint")
        state = self._state()
        values = self._values or {}
        packed = {**packed, **self._full(values.get("extra", {})), "state": dict(state)}
        for key, slots in values.get("other_state", ()):
            packed["state"][key] = self._full(slots)
        self._load(packed)
        self._undo_conversions(state)

    def _state(self) -> dict[int, dict[Any, Any]]:
        """What the checkpoint has of each parameter, by number."""
        state: dict[int, dict[Any, Any]] = {}
        for key, value in self._tensors.items():
            name, _, slot = key.rpartition("/")
            if name in self._number and not slot.startswith("#"):
                number = self._number[name]
                place = placed if self._values is None else _beside
                state.setdefault(number, {})[slot] = place(slot, value, self._parameters[number], self._optimizer)
        for name, rest in (self._values or {}).get("state", {}).items():
            if name not in self._number:
                raise not_trained(name)
            state.setdefault(self._number[name], {}).update(self._full(rest))
        return state

    def _whole(self, values: Mapping[str, Any]) -> Any:
        if values["order"] != self._order:
            raise self._refused("the order of its parameters has changed, which its own state_dict() depends on")
        return self._full(values["whole"])

    def _full(self, value: Any) -> Any:
        """The same value with tensors and parameters in the place of references."""
        if isinstance(value, Mapping):
            if set(value) == {_IN_SECTION}:
                return self._tensors[value[_IN_SECTION]]
            return {self._key(key): self._full(item) for key, item in value.items()}
        return _rebuilt(value, self._full)

    def _key(self, key: Any) -> Any:
        if isinstance(key, tuple) and len(key) == 2 and key[0] == _PARAMETER:
            return self._parameters[self._number[key[1]]]
        return key

    def _load(self, packed: Any) -> None:
        try:
            with warnings.catch_warnings():  # torch converts complex moments to real ones; `_undo_conversions` follows
                warnings.filterwarnings("ignore", "Casting complex values to real")
                self._optimizer.load_state_dict(packed)
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            raise self._refused(f"its load_state_dict() raised {type(error).__name__}: {error}") from error

    def _undo_conversions(self, state: Mapping[int, Mapping[Any, Any]]) -> None:
        """Give moments the type they were saved in.

        torch's load_state_dict converts them to their parameter's type (a float32 moment of a bfloat16 parameter loses
        half of its bits) and makes containers again without their arguments. An optimizer whose state_dict() is not
        torch's may keep something else than it saves; there its load_state_dict() decides.
        """
        if type(self._optimizer).state_dict is not Optimizer.state_dict:
            return
        for number, slots in state.items():
            self._optimizer.state[self._parameters[number]] = dict(slots)

    def _refused(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"the optimizer state of the checkpoint cannot be given to {type(self._optimizer).__name__}: {reason}; "
            "start from the weights alone (resume=False, load_from=...)"
        )


def _rebuilt(value: Any, change: Callable[[Any], Any]) -> Any:
    """A list, tuple or deque with changed items; any other value as it is."""
    if type(value) is deque:
        return deque((change(item) for item in value), value.maxlen)
    if type(value) in (list, tuple):
        return type(value)(change(item) for item in value)
    return value


def _fault(tensor: Tensor, parameter: Tensor | None) -> str:
    """Why a tensor could not be saved or restored; "" if it can be."""
    if is_dtensor(tensor):
        sharded: Any = tensor
        is_like = parameter is not None and is_dtensor(parameter) and tensor.shape == parameter.shape
        if not is_like or sharded.placements != parameter.placements or mesh_of(tensor) != mesh_of(parameter):  # type: ignore[union-attr, arg-type]
            return "a tensor that is divided over the ranks in another way than its parameter"
    elif type(tensor) not in (Tensor, nn.Parameter):
        return f"a {type(tensor).__name__}, a kind of tensor that has more than its values"
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return f"a tensor of layout {tensor.layout}"
    return "" if tensor.dtype in DTYPES.values() else f"a tensor of type {tensor.dtype}"


def _cannot_be_saved(optim: OptimWrapper, reason: str) -> ConfigError:
    kinds = ", ".join(sorted({type(one).__name__ for one in optim.optimizers.values()}))
    return ConfigError(
        f"optim_wrapper.optimizer: the state of {kinds} cannot be saved: {reason}. Save without it by "
        "default_hooks.checkpoint.save_optimizer=False (a resume then starts the optimizer from scratch), or use "
        "another optimizer"
    )
