"""Model and optimizer state by plain parameter name, for strategies whose parameters are the module's own.

An optimizer's state is keyed ``<parameter name>/<slot>`` (``layers.0.weight/exp_avg``). It holds tensors only: the
hyperparameters of the groups come from today's config, never from a checkpoint.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mmtrain.errors import CheckpointError, ConfigError
from mmtrain.optim import OptimWrapper
from mmtrain.strategies.base import SavedTensor


def broadcast_buffers(module: nn.Module) -> None:
    """Copy rank 0's persistent buffers to all ranks; a collective."""
    kept = module.state_dict(keep_vars=True)
    for name, value in module.named_buffers():
        if name in kept:
            torch.distributed.broadcast(value, 0)


def optimizer_tensors(model: nn.Module, optim: OptimWrapper) -> dict[str, Tensor]:
    """The optimizer's state as tensors; numbers become 0-d float64 tensors. Raises ConfigError for anything else."""
    tensors = {}
    for name, (parameter, optimizer) in _optimized(model, optim).items():
        for slot, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, (bool, int, float)):
                tensors[f"{name}/{slot}"] = torch.tensor(value, dtype=torch.float64)
            elif isinstance(value, Tensor):
                tensors[f"{name}/{slot}"] = value
            elif value is not None:
                raise ConfigError(
                    f"optim_wrapper.optimizer: {type(optimizer).__name__} keeps a {type(value).__name__} as {slot!r} "
                    f"of {name}, and a checkpoint holds tensors and numbers only; save without it by "
                    "default_hooks.checkpoint.save_optimizer=False (a resume then starts its state from scratch), or "
                    "use another optimizer"
                )
    return tensors


def not_trained(name: str) -> CheckpointError:
    """The error of a checkpoint that holds optimizer state for a parameter that this run does not train."""
    return CheckpointError(
        f"the checkpoint holds optimizer state for {name!r}, which this run does not train; "
        "start from its weights alone (resume=False, load_from=...) or train the same parameters"
    )


def load_optimizer_tensors(model: nn.Module, optim: OptimWrapper, state: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave, each tensor on its parameter's device where the optimizer keeps it.

    Raises CheckpointError where the state names a parameter that this optimizer does not train, or where a moment has
    another shape than its parameter.
    """
    parameters = _optimized(model, optim)
    slots: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        name, _, slot = key.rpartition("/")
        if name not in parameters:
            raise not_trained(name)
        shape = parameters[name][0].shape
        if value.dim() and value.shape != shape and value.numel() == shape.numel():
            raise CheckpointError(f"optimizer state {key!r} has shape {tuple(value.shape)}, its parameter has another")
        slots.setdefault(name, {})[slot] = value
    for name, own in slots.items():
        parameter, optimizer = parameters[name]
        optimizer.state[parameter] = {slot: placed(slot, value, parameter, optimizer) for slot, value in own.items()}


def sharded_targets(model: nn.Module, saved: Mapping[str, SavedTensor]) -> dict[str, Tensor]:
    """Memory for saved optimizer tensors: what has its parameter's shape is cut as the parameter is."""
    parameters = dict(model.named_parameters())
    targets: dict[str, Tensor] = {}
    for key, tensor in saved.items():
        parameter = parameters.get(key.rpartition("/")[0])
        if parameter is not None and parameter.shape == tensor.shape and tensor.shape:
            targets[key] = torch.empty_like(parameter.detach(), dtype=tensor.dtype)
        else:
            targets[key] = torch.empty(tensor.shape, dtype=tensor.dtype)
    return targets


def placed(slot: str, value: Tensor, parameter: Tensor, optimizer: Optimizer) -> Tensor | float:
    """A loaded value where the optimizer keeps it: numbers as numbers, moments beside their parameter."""
    own_kind = parameter.dim() == 0 and parameter.dtype == torch.float64  # whose moments look like numbers
    if value.dim() == 0 and value.dtype == torch.float64 and (slot == "step" or not own_kind):
        return value.item()
    if slot == "step" and not any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups):
        return value.cpu().clone()  # torch keeps step counts on the CPU unless a fused kernel reads them
    return value.to(parameter.device, copy=True)


def _optimized(model: nn.Module, optim: OptimWrapper) -> dict[str, tuple[nn.Parameter, Optimizer]]:
    """Each trained parameter by its name, with the optimizer that trains it. Raises ConfigError where two do."""
    trained: dict[int, Optimizer] = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for optimizer in optim.optimizers.values():
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            if trained.setdefault(id(parameter), optimizer) is not optimizer:
                raise ConfigError(
                    f"optim_wrapper: {names.get(id(parameter), 'a parameter')} is trained by two optimizers, whose "
                    "moments a checkpoint could not tell apart; give it to one of them"
                )
    return {name: (p, trained[id(p)]) for name, p in model.named_parameters() if id(p) in trained}
