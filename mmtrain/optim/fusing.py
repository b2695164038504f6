"""When torch's fused kernels are used: the one place that decides.

A fused kernel updates all parameters in one call, and walks over each parameter, its gradient and its moments by
address. It is used where the config names no other implementation and where torch has a kernel for every parameter:

* the optimizer is torch's own and has one for the device (Adagrad only on the CPU);
* parameters are floating point, and dense in memory, so that moments made like them have the same strides;
* no gradient is sparse;
* sharded parameters (DTensor): only those of Adam and AdamW, the others have no sharding rule in torch;
* SGD: without ``dampening``, because of `begin_late_momentum`.
"""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from mmtrain.dtensor import is_dtensor
from mmtrain.source_lines import config_error

# Whoever names one of these has chosen an implementation.
_IMPLEMENTATIONS = ("fused", "foreach", "capturable", "differentiable")
# Adagrad's fused kernel is for the CPU alone.
_FUSED_DEVICES = {"Adagrad": ("cpu",)}
_FUSED_WITH_SHARDS = ("Adam", "AdamW")


class Fusing(NamedTuple):
    """Whether to use the fused kernel, and a sentence for the log where something unusual about the model decided."""

    use: bool
    notice: str = ""


def decide(cls: Any, given: Mapping[str, Any], model: nn.Module, parameters: Iterable[Tensor], *, path: str) -> Fusing:
    """Decide for an optimizer class, its arguments in the config and the parameters that it will train.

    Raises ConfigError where the config asks for a fused kernel that torch does not have, and for a parameter whose
    elements share memory (``expand()``), which no optimizer can update in place.
    """
    parameters = list(parameters)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter in parameters:
        if _overlaps(parameter):
            raise config_error(
                path,
                f"elements of {names.get(id(parameter), 'a parameter')} share memory (it was made by expand()), so no "
                "optimizer can update it; make it with .clone()",
            )
    if not _has_kernel(cls):
        return Fusing(False)
    asked = bool(given.get("fused"))
    if not asked and any(given.get(name) is not None for name in _IMPLEMENTATIONS):
        return Fusing(False)
    obstacle, is_unusual = _obstacle(cls, given, model, parameters, names)
    if obstacle and asked:
        raise config_error(f"{path}.fused", f"torch has no fused {cls.__name__} for {obstacle}; leave fused out")
    notice = f"{path}: {cls.__name__} runs without torch's fused kernel, which does not support {obstacle}."
    return Fusing(not obstacle, notice if obstacle and is_unusual else "")


def _has_kernel(cls: Any) -> bool:
    is_torchs = getattr(cls, "__module__", "").partition(".")[0] == "torch"
    return is_torchs and "fused" in inspect.signature(cls).parameters


def _obstacle(
    cls: Any, given: Mapping[str, Any], model: nn.Module, parameters: list[Tensor], names: Mapping[int, str]
) -> tuple[str, bool]:
    """What the fused kernel cannot take, "" where there is nothing; and whether that deserves a line in the log."""
    for parameter in parameters:
        name = names.get(id(parameter), "a parameter")
        if fault := _fault(cls, parameter):
            return f"{fault} ({name})", False
        if not is_dtensor(parameter) and not is_dense(parameter):
            return f"parameters with gaps in memory ({name}, strides {tuple(parameter.stride())})", True
    if any(getattr(module, "sparse", False) for module in model.modules()):
        return "the sparse gradients of an embedding", False
    return ("dampening" if cls is SGD and given.get("dampening") else ""), False


def _fault(cls: Any, parameter: Tensor) -> str:
    if not torch.is_floating_point(parameter):
        return f"parameters of type {parameter.dtype}"
    if parameter.device.type not in _FUSED_DEVICES.get(cls.__name__, _fused_devices()):
        return f"parameters on {parameter.device.type}"
    is_unknown_shard = is_dtensor(parameter) and cls.__name__ not in _FUSED_WITH_SHARDS
    return "sharded parameters" if is_unknown_shard else ""


def is_dense(parameter: Tensor) -> bool:
    """Whether a tensor made like this one has its strides: torch preserves those of dense tensors alone."""
    return torch.empty_like(parameter, device="meta").stride() == parameter.stride()


def _overlaps(parameter: Tensor) -> bool:
    if is_dtensor(parameter):
        return False
    return any(step == 0 and size > 1 for step, size in zip(parameter.stride(), parameter.shape, strict=True))


def begin_late_momentum(optimizer: Optimizer) -> None:
    """Make a fused SGD train parameters that get their first gradient after the first step, as an unfused SGD does.

    torch's fused SGD takes momentum buffers for all parameters of a step or for none. A buffer of zeros gives the
    update that no buffer gives: ``momentum * 0 + gradient``.
    """
    if isinstance(optimizer, SGD):
        optimizer.register_step_pre_hook(_fill_missing_momentum)


def _fill_missing_momentum(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    groups, state = optimizer.param_groups, optimizer.state
    if not state or len(state) == sum([len(group["params"]) for group in groups]):
        return
    for group in groups:
        if group["momentum"] and group.get("fused"):
            for parameter in group["params"]:
                if parameter.grad is not None and state.get(parameter, {}).get("momentum_buffer") is None:
                    state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _fused_devices() -> tuple[str, ...]:
    try:
        from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

        return tuple(_get_fused_kernels_supported_devices())
    except ImportError:  # private: without it, what every torch since 2.4 has
        return ("cuda", "cpu", "mps", "xpu")
