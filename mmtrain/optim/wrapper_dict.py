"""Several optimizers, each in its own wrapper, for models whose ``train_step`` uses them separately (GANs)."""

from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mmtrain.errors import RunError
from mmtrain.optim.wrappers import OptimWrapper
from mmtrain.registry import OPTIM_WRAPPERS
from mmtrain.source_lines import config_error
from mmtrain.types import MicroBatch, StepResult


def _on_all(name: str) -> Any:
    """An attribute that is set on every wrapper and read from the first."""

    def read(self: "OptimWrapperDict") -> Any:
        return getattr(next(iter(self.values())), name)

    def write(self: "OptimWrapperDict", value: Any) -> None:
        for wrapper in self.values():
            setattr(wrapper, name, value)

    return property(read, write, doc=f"``{name}`` of all wrappers.")


@OPTIM_WRAPPERS.register_module()
class OptimWrapperDict(OptimWrapper):
    """Wrappers by name: ``optim_wrapper['generator'].update_params(loss)``.

    ``backward``, ``step``, ``update_params`` and ``optim_context`` belong to the single wrappers; here they are errors.
    """

    want_grad_norm = _on_all("want_grad_norm")
    skip_nonfinite = _on_all("skip_nonfinite")
    micro_batch = _on_all("micro_batch")
    accumulative_counts = _on_all("accumulative_counts")
    loss_weight = _on_all("loss_weight")
    gradient_scale = _on_all("gradient_scale")

    def __init__(self, **optim_wrappers: OptimWrapper) -> None:
        for name, wrapper in optim_wrappers.items():
            if not isinstance(wrapper, OptimWrapper):
                found = type(wrapper).__name__
                raise config_error(f"optim_wrapper.{name}", f"found a {found}, expected an OptimWrapper")
        if not optim_wrappers:
            raise config_error("optim_wrapper", "expected at least one OptimWrapper, found none")
        counts = {name: wrapper.accumulative_counts for name, wrapper in optim_wrappers.items()}
        if len(set(counts.values())) > 1:
            raise config_error("optim_wrapper", f"accumulative_counts differ: {counts}; expected the same for all")
        self.optim_wrappers = optim_wrappers
        self.base_group = None

    def take_result(self) -> StepResult | None:
        """The results of all wrappers that stepped as one: applied if any was, with the norm over all gradients."""
        results = [result for wrapper in self.values() if (result := wrapper.take_result())]
        if not results:
            return None
        norms = [result.grad_norm for result in results if result.grad_norm is not None]
        norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else None
        return StepResult(norm, any(result.applied for result in results))

    @property
    def notices(self) -> list[str]:  # type: ignore[override]
        return [f"{name}: {notice}" for name, wrapper in self.items() for notice in wrapper.notices]

    def zero_grad(self, **kwargs: Any) -> None:
        for wrapper in self.values():
            wrapper.zero_grad(**kwargs)

    def clear_gradients(self) -> None:
        for wrapper in self.values():
            wrapper.clear_gradients()

    def initialize_count_status(self, model: nn.Module, init_counts: int, max_counts: int) -> None:
        """Nothing: each wrapper counts for itself."""

    def _for_each(self, method: str) -> NoReturn:
        names = ", ".join(self.keys())
        raise RunError(
            f"there are several optimizers ({names}): call {method} of one of them in the model's train_step"
        )

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        self._for_each("backward")

    def update_params(self, loss: Tensor, step_kwargs: Any = None, zero_kwargs: Any = None) -> None:
        self._for_each("update_params")

    def step(self, **kwargs: Any) -> None:
        self._for_each("step")

    def finish_window(self) -> StepResult:
        self._for_each("update_params")

    def forward_context(self, model: nn.Module, mb: MicroBatch) -> AbstractContextManager[Any]:
        self._for_each("optim_context")

    def optim_context(self, model: nn.Module) -> AbstractContextManager[Any]:
        self._for_each("optim_context")

    def should_sync(self) -> bool:
        self._for_each("should_sync")

    @property
    def inner_count(self) -> int:
        return max(wrapper.inner_count for wrapper in self.values())

    @property
    def param_groups(self) -> dict[str, list[dict[str, Any]]]:
        """The groups of each optimizer by its name, as in MMEngine."""
        return {name: wrapper.param_groups for name, wrapper in self.items()}

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        return {name: wrapper.optimizer for name, wrapper in self.items()}

    @property
    def defaults(self) -> dict[str, Any]:
        return {name: wrapper.defaults for name, wrapper in self.items()}

    def get_lr(self) -> dict[str, list[float]]:
        return {f"{name}.{key}": values for name, w in self.items() for key, values in w.get_lr().items()}

    def get_momentum(self) -> dict[str, list[float]]:
        return {f"{name}.{key}": values for name, w in self.items() for key, values in w.get_momentum().items()}

    def state_dict(self) -> dict[str, Any]:
        return {name: wrapper.state_dict() for name, wrapper in self.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        if unknown := sorted(set(state_dict) - set(self.keys())):
            raise RunError(f"optim_wrapper.{unknown[0]} is in the checkpoint but not among {', '.join(self.keys())}")
        for name, state in state_dict.items():
            self.optim_wrappers[name].load_state_dict(state)

    def items(self) -> ItemsView[str, OptimWrapper]:
        """Names and wrappers."""
        return self.optim_wrappers.items()

    def values(self) -> ValuesView[OptimWrapper]:
        """The wrappers."""
        return self.optim_wrappers.values()

    def keys(self) -> KeysView[str]:
        """The names."""
        return self.optim_wrappers.keys()

    def __getitem__(self, name: str) -> OptimWrapper:
        return self.optim_wrappers[name]

    def __contains__(self, name: str) -> bool:
        return name in self.optim_wrappers

    def __iter__(self) -> Iterator[str]:
        return iter(self.optim_wrappers)

    def __len__(self) -> int:
        return len(self.optim_wrappers)

    def __repr__(self) -> str:
        return "\n".join(f"{name}: {wrapper!r}" for name, wrapper in self.items())
