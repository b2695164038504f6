"""Tensor parallelism: the linear layers of a plan are split over neighbouring ranks, everything else is repeated.

A plan maps patterns of module names (``*`` matches one part of a name) to ``'colwise'`` or ``'rowwise'``. A colwise
layer is split along its outputs and gives each rank its part of them; a rowwise layer takes such parts, is split along
its inputs and sums over ranks (Shoeybi et al., 2019, section 3). Between the two, activations are split; everywhere
else they, and the parameters, are the same on all of these ranks.
"""

import logging
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mmtrain.dtensor import local_tensor
from mmtrain.errors import ConfigError, RunError
from mmtrain.randomness import mix
from mmtrain.strategies.wrapping import shared_parameters

TOLERANCE = 1e-3  # between gradients that are equal up to rounding, relative to the sum of their magnitudes
STYLES = ("colwise", "rowwise")
_HOW = "strategy.tensor_parallel={'blocks.*.attention.qkv': 'colwise', 'blocks.*.attention.out': 'rowwise', ...}"


def plan_for(model: nn.Module, asked: Mapping[str, str] | None, size: int) -> dict[str, str]:
    """Module name to style: of the plan in the config, else of the model's ``tensor_parallel_plan(size)``.

    Raises ConfigError if there is no plan, or one that this model or ``size`` ranks cannot follow.
    """
    own = getattr(model, "tensor_parallel_plan", None)
    if asked is None and not callable(own):
        raise ConfigError(
            f"strategy.mesh.tp={size}: {type(model).__name__} has no tensor_parallel_plan() that says which of its "
            f"layers to cut; give a plan: {_HOW}"
        )
    plan: Mapping[str, str] = asked if asked is not None else own(size)  # type: ignore[misc]
    if not plan:
        raise ConfigError(f"strategy.tensor_parallel: the plan is empty; expected {_HOW}")
    modules = {name: module for name, module in model.named_modules() if name}
    found: dict[str, str] = {}
    for pattern, style in plan.items():
        where = f"strategy.tensor_parallel[{pattern!r}]"
        if style not in STYLES:
            raise ConfigError(f"{where} is {style!r}; expected 'colwise' or 'rowwise'")
        names = [name for name in modules if _fits(name, pattern)]
        if not names:
            linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
            raise ConfigError(f"{where}: no module has this name; the linear layers are {', '.join(linear[:8])}, ...")
        found |= dict.fromkeys(names, style)
    for names in shared_parameters(model):
        cut = [name for name in names if name.rpartition(".")[0] in found]
        if cut:
            raise ConfigError(
                f"strategy.tensor_parallel: {' and '.join(names)} are one parameter, which cannot be cut for one of "
                f"its uses; leave {cut[0].rpartition('.')[0]} out of the plan"
            )
    for name, style in found.items():
        _check_layer(name, modules[name], style, size)
    return found


def _fits(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _check_layer(name: str, module: nn.Module, style: str, size: int) -> None:
    if not isinstance(module, nn.Linear):
        raise ConfigError(
            f"strategy.tensor_parallel: {name} is a {type(module).__name__}; only Linear layers can be split"
        )
    channels, what = (module.out_features, "outputs") if style == "colwise" else (module.in_features, "inputs")
    if channels % size:
        raise ConfigError(
            f"strategy.mesh.tp: the {channels} {what} of {name} cannot be divided among {size} processes; "
            "use a size that divides them"
        )


def parallelise(model: nn.Module, mesh: Any, plan: Mapping[str, str]) -> None:
    """Split the layers of a plan from `plan_for` over the ranks of ``mesh``; before, every rank holds the full model.

    Random draws between a colwise and the following rowwise layer (dropout of attention) then differ between ranks.
    """
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    # It warns once that a tensor that is split twice takes two exchanges to gather.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    styles = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
    layers = {name: styles[style]() for name, style in plan.items()}
    parallelize_module(model, mesh, layers, src_data_rank=None)  # every rank has the same values: none is sent
    draws = _OwnDraws(mesh.get_local_rank())
    model.register_forward_pre_hook(lambda *_: draws.forget())
    for name, style in plan.items():
        module = model.get_submodule(name)
        if style == "colwise":
            module.register_forward_hook(draws.entering(name.rpartition(".")[0]))
        else:
            module.register_forward_pre_hook(lambda *_: draws.leave())


class _OwnDraws:
    """Lets torch's generator use a separate stream of this rank where activations are split.

    All ranks that share a copy of the model seed a step alike, so that dropout of repeated activations is the same on
    them. Where activations are split, that would repeat one mask in every part. The stream's seed is drawn from the
    common one, so that a forward that is computed again in backward draws the same.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._inside: tuple[str, Tensor] | None = None  # the module that was entered, and the common state

    def entering(self, parent: str) -> Any:
        """The forward hook of a colwise layer of ``parent``, which may have several."""

        def enter(module: nn.Module, args: Any, output: Tensor) -> None:
            if not module.training or (self._inside is not None and self._inside[0] == parent):
                return
            self._generator = _generator(output.device)
            seed = mix(_draw(self._generator), self._rank)
            self._inside = (parent, self._generator.get_state())
            self._generator.manual_seed(seed)

        return enter

    def leave(self) -> None:
        """Continue with the common stream."""
        if self._inside is not None:
            self._generator.set_state(self._inside[1])
            self._inside = None

    def forget(self) -> None:
        """Begin a forward; close what an error, or a recomputation that ended early, left open."""
        self._inside = None


def _generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        return torch.cuda.default_generators[torch.cuda.current_device()]
    return torch.default_generator


def _draw(generator: torch.Generator) -> int:
    """Draw a number without waiting for the device."""
    if generator.device.type == "cuda":
        offset = generator.get_offset()
        generator.set_offset(offset + 4)  # a multiple of four, as its Philox counter requires
        return mix(generator.initial_seed(), offset)
    return int(torch.empty((), dtype=torch.int64).random_(generator=generator))


def check_replicas_once(model: nn.Module, optimizer: Optimizer, mesh: Any) -> None:
    """Before the first step, compare the gradients of what is repeated over ``mesh``; a collective within the step.

    Raises RunError if they differ: otherwise the ranks would silently drift apart.
    """
    named: list[tuple[str, Any]] = [*model.named_parameters()]
    cut_along = mesh.mesh_dim_names[0]
    repeated = [(n, p) for n, p in named if p.requires_grad and cut_along not in p.device_mesh.mesh_dim_names]
    if not repeated:
        return

    compared = False

    def check(*_: Any) -> None:
        nonlocal compared  # a hook that removed itself would stop torch's iteration over the others
        if compared:
            return
        compared = True
        own = torch.stack([_fingerprint(parameter) for _, parameter in repeated])
        everyone = [torch.empty_like(own) for _ in range(mesh.size())]
        torch.distributed.all_gather(everyone, own, group=mesh.get_group())
        sums = torch.stack(everyone)
        apart = (sums.amax(0) - sums.amin(0)).amax(1) / sums[..., 1].amax(0).clamp_min(1e-30)
        if apart.max() > TOLERANCE:  # clipping by a different norm spreads to all: the worst is the cause
            raise RunError(_apart(repeated[int(apart.argmax())][0]))

    optimizer.register_step_pre_hook(check)


def _fingerprint(parameter: Tensor) -> Tensor:
    own = local_tensor(parameter if parameter.grad is None else parameter.grad).detach().double()
    sums = torch.stack([own.sum(), own.abs().sum()])
    return sums if parameter.grad is not None else torch.zeros_like(sums)


def _apart(name: str) -> str:
    return (
        f"the gradients of {name} differ between ranks that share a copy of the model: either they read different "
        "samples (a data set or sampler that divides by rank itself must do so by mmtrain.dist.data_rank()), or the "
        "parameter is used between a colwise and a rowwise layer of the tensor-parallel plan, where each rank sees "
        "only a part; cut other layers"
    )
