"""Which modules of a model become a unit: of sharding, or of activation checkpointing."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from mmtrain.errors import ConfigError
from mmtrain.printable import listed
from mmtrain.suggest import did_you_mean


def modules_of_class(model: nn.Module, names: Sequence[str], path: str) -> list[nn.Module]:
    """The modules whose class has one of these names, inner ones first. Raises ConfigError for a name not found."""
    there = {type(module).__name__ for module in model.modules()}
    for name in names:
        if name not in there:
            hint = did_you_mean(name, there) or f"; it has {', '.join(sorted(there))}"
            raise ConfigError(f"{path}: the model has no module of class {name!r}{hint}")
    found = [module for module in model.modules() if type(module).__name__ in names and module is not model]
    return found[::-1]


def modules_of_size(model: nn.Module, least: int) -> list[nn.Module]:
    """Modules with ``least`` parameters or more that no inner one has taken, inner ones first.

    A module that shares a parameter with one outside of it is left to the root, and so are containers without
    their own forward.
    """
    shared = {name for names in shared_parameters(model) for name in names}
    found: list[nn.Module] = []

    def visit(module: nn.Module, prefix: str) -> int:
        left = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        left += sum(visit(child, f"{prefix}{name}.") for name, child in module.named_children())
        callable_ = not isinstance(module, nn.ModuleList | nn.ModuleDict)
        ties = any(name.startswith(prefix) for name in shared)
        if left >= least and callable_ and not ties and module is not model:
            found.append(module)
            return 0
        return left

    visit(model, "")
    return found


def shared_parameters(model: nn.Module) -> list[list[str]]:
    """The names of each parameter that has more than one."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def checkpoint_activations(modules: Iterable[nn.Module]) -> None:
    """Let these modules compute their forward again in backward; names in the state do not change."""
    for module in modules:
        module.forward = _recomputed(module.forward)  # type: ignore[method-assign]


def _recomputed(forward: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


def refuse_empty(model: nn.Module, engine: str) -> None:
    """Raise ConfigError for a parameter without elements, which an engine that cuts each parameter cannot take."""
    for name, parameter in model.named_parameters():
        if parameter.numel() == 0:
            raise ConfigError(
                f"model: {name} has shape {tuple(parameter.shape)} and no elements, which {engine} cannot divide among "
                "processes; leave it out, or use DDPStrategy"
            )


def lay_out_contiguously(model: nn.Module, engine: str) -> list[str]:
    """Store each parameter in the order of its shape, as engines that cut or flatten parameters need it.

    The values stay the same. Returns a sentence for the log, or none. Raises ConfigError for a parameter whose elements
    share memory.
    """
    changed = []
    for name, parameter in model.named_parameters():
        if any(stride == 0 and size > 1 for size, stride in zip(parameter.shape, parameter.stride(), strict=True)):
            raise ConfigError(
                f"model: elements of {name} share memory, as those of a tensor from expand() do, which {engine} cannot "
                "train; give it memory of its own, nn.Parameter(x.expand(...).clone()), or expand it in forward()"
            )
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
            changed.append(name)
    if not changed:
        return []
    return [f"{engine} stores {listed(changed)} contiguously, not in the memory layout that the model set"]
