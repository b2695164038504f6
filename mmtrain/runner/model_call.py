"""How the train and evaluation loops call a model: MMEngine's `BaseModel`, or any module that returns a loss."""

import inspect
from collections.abc import Mapping
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, nn

from mmtrain.errors import RunError


class ModelCall:
    """Calls the model with a batch and finds the loss and its parts in what comes back.

    A model with a ``data_preprocessor`` and a ``mode`` argument is called as MMEngine's `BaseModel` is:
    ``forward(**batch, mode="loss")``, ``mode="predict"`` in evaluation. Any other module is called with the batch's
    items as keyword arguments when the batch is a mapping, as positional arguments when it is a list or tuple, else
    with the batch itself; it returns a mapping or an object with ``loss``.
    """

    def __init__(self, model: nn.Module, module: nn.Module, device: torch.device) -> None:
        self.module = module
        self.device = device
        self.preprocessor = getattr(model, "data_preprocessor", None)
        self.has_mode = "mode" in inspect.signature(model.forward).parameters
        self.has_own_train_step = has_own_train_step(model)
        self.train_step: Any = getattr(model, "train_step", None)
        self._is_cpu = device.type == "cpu"

    def prepare(self, batch: Any, *, training: bool) -> Any:
        """Put a batch on the device, through the model's own preprocessor if it has one."""
        if self.preprocessor is not None:
            return self.preprocessor(batch, training)
        return batch if self._is_cpu else to_device(batch, self.device)

    def __call__(self, batch: Any, mode: str = "loss") -> Any:
        """Run the model on a prepared batch."""
        extra = {"mode": mode} if self.has_mode else {}
        if isinstance(batch, (dict, Mapping)):
            return self.module(**batch, **extra)
        if isinstance(batch, (list, tuple)):
            return self.module(*batch, **extra)
        return self.module(batch, **extra)

    def num_tokens(self, outputs: Any) -> Any:
        """The number of tokens that the loss is the mean of, if the model's output says it (``num_tokens``)."""
        if type(outputs) is dict:
            return outputs.get("num_tokens")
        return outputs.get("num_tokens") if isinstance(outputs, Mapping) else getattr(outputs, "num_tokens", None)

    def losses(self, outputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimise and every scalar worth logging, ``loss`` among them.

        Raises RunError if there is no loss, or if it is not a scalar.
        """
        if type(outputs) is dict and not self.has_mode:  # the common case, without the cost of abstract classes
            loss = outputs.get("loss")
            if type(loss) is Tensor and loss.dim() == 0:
                return loss, outputs if len(outputs) == 1 else _scalars(outputs)
        if self.has_mode and isinstance(outputs, Mapping):
            return _sum_of_losses(outputs)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
        if loss is None and isinstance(outputs, Tensor):
            loss = outputs
        if not isinstance(loss, Tensor):
            raise RunError(
                f"forward() must return a dict whose 'loss' is a tensor; it returned {_describe(outputs)}. "
                "Return dict(loss=loss)"
            )
        if loss.numel() != 1:
            raise RunError(f"the model's loss has shape {tuple(loss.shape)}; expected a scalar: reduce it with .mean()")
        return loss.reshape(()), {"loss": loss, **(_scalars(outputs) if isinstance(outputs, Mapping) else {})}


def _scalars(outputs: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in outputs.items() if isinstance(value, Tensor) and value.numel() == 1}


def has_own_train_step(model: nn.Module) -> bool:
    """Whether a model brings a ``train_step`` that is not MMEngine's default one."""
    step = getattr(type(model), "train_step", None)
    if step is None:
        return False
    return getattr(step, "__module__", "") != "mmengine.model.base_model.base_model"


def to_device(value: Any, device: torch.device) -> Any:
    """Move the tensors of nested mappings, lists and tuples, and objects with ``.to``, to ``device``."""
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(item, device) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(to_device(item, device) for item in value)
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    return value.to(device) if hasattr(value, "to") else value


def _sum_of_losses(outputs: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    # MMEngine's parse_losses: the mean of each entry, and the sum of those whose name contains "loss".
    parts: dict[str, Tensor] = {}
    for name, value in outputs.items():
        if name == "num_tokens" and not isinstance(value, Tensor):
            continue
        if isinstance(value, Tensor):
            parts[name] = value.mean()
        elif isinstance(value, (list, tuple)) and all(isinstance(item, Tensor) for item in value):
            parts[name] = sum(item.mean() for item in value)  # type: ignore[assignment]
        else:
            raise RunError(f"the model's output {name!r} is {_describe(value)}; expected a tensor or a list of tensors")
    found = [value for name, value in parts.items() if "loss" in name]
    if not found:
        raise RunError(f"the model returned {sorted(parts)}; expected at least one key with 'loss' in its name")
    total = reduce(add, found)
    return total, {"loss": total, **{name: value for name, value in parts.items() if name != "loss"}}


def _describe(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a mapping with the keys {sorted(map(str, value))}"
    return f"a {type(value).__name__}"
