"""From the config's ``optim_wrapper`` to an optimizer in its wrapper, and ``auto_scale_lr``."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from mmtrain.optim.fusing import begin_late_momentum
from mmtrain.optim.fusing import decide as fusing_of
from mmtrain.optim.param_groups import Group, ParamwiseRules, argument_of, group_parameters, trainable_group
from mmtrain.optim.wrapper_dict import OptimWrapperDict
from mmtrain.optim.wrappers import OptimWrapper
from mmtrain.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS, build, resolve
from mmtrain.registry.arguments import arguments_of
from mmtrain.source_lines import config_error
from mmtrain.suggest import did_you_mean

_SCALE_KEYS = ("enable", "base_batch_size", "rule")


def build_optim_wrapper(model: nn.Module, cfg: Any, *, path: str = "optim_wrapper") -> OptimWrapper:
    """Build the optimizer of ``model`` in its wrapper.

    ``cfg``: ``type`` (OptimWrapper by default), ``optimizer``, ``paramwise_cfg``, ``constructor`` and the wrapper's
    arguments; a wrapper or an optimizer that is already built is taken as it is. Optimizers of torch that have a fused
    implementation use it where the parameters allow. Raises ConfigError.
    """
    if isinstance(cfg, OptimWrapper):
        return cfg
    if isinstance(cfg, Optimizer):
        return OptimWrapper(cfg)
    if not isinstance(cfg, Mapping):
        raise config_error(path, f"expected a dict with 'optimizer', found {cfg!r}")
    wrapper_cfg = dict(cfg)
    constructor = wrapper_cfg.pop("constructor", None)
    paramwise_cfg = wrapper_cfg.pop("paramwise_cfg", None)
    if constructor is None:
        return DefaultOptimWrapperConstructor(wrapper_cfg, paramwise_cfg, path=path)(model)
    made = resolve(OPTIM_WRAPPER_CONSTRUCTORS, constructor, path=f"{path}.constructor")
    made = made(wrapper_cfg, paramwise_cfg)(model)
    if isinstance(made, OptimWrapper):
        return made
    if isinstance(getattr(made, "optimizer", None), Optimizer):
        # A constructor written for MMEngine: its optimizer is what it decided, the wrapper is ours.
        wrapper_cfg.pop("optimizer", None)
        return _wrap(made.optimizer, wrapper_cfg, path)
    raise config_error(f"{path}.constructor", f"{constructor!r} made a {type(made).__name__}, expected an OptimWrapper")


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class DefaultOptimWrapperConstructor:
    """Makes the parameter groups, the optimizer and the wrapper, with MMEngine's two arguments.

    A constructor of your own may derive from it and override `make_groups`, or be any class with these two arguments
    whose call takes the model and returns an `OptimWrapper` or an `OptimWrapperDict`.
    """

    def __init__(
        self,
        optim_wrapper_cfg: Mapping[str, Any],
        paramwise_cfg: Mapping[str, Any] | None = None,
        *,
        path: str = "optim_wrapper",
    ) -> None:
        self.wrapper_cfg = dict(optim_wrapper_cfg)
        self.path = path
        if "optimizer" not in self.wrapper_cfg:
            hint = did_you_mean("optimizer", [key for key in self.wrapper_cfg if key != "type"])
            raise config_error(path, f"'optimizer' is missing, expected such as dict(type='AdamW', lr=1e-4){hint}")
        self.optimizer_cfg = self.wrapper_cfg.pop("optimizer")
        if not isinstance(self.optimizer_cfg, Mapping | Optimizer):
            raise config_error(f"{path}.optimizer", f"expected a dict with 'type', found {self.optimizer_cfg!r}")
        if paramwise_cfg is not None and not isinstance(paramwise_cfg, Mapping):
            raise config_error(f"{path}.paramwise_cfg", f"expected a dict, found {paramwise_cfg!r}")
        self.paramwise_cfg: Mapping[str, Any] = paramwise_cfg or {}
        self.notices: list[str] = []

    def make_groups(self, model: nn.Module, optimizer_class: type[Optimizer]) -> list[Group]:
        """The groups: ``params``, ``param_names`` and what differs from the optimizer's defaults."""
        if not self.paramwise_cfg:
            return trainable_group(model)
        rules = ParamwiseRules(
            self.paramwise_cfg,
            base_lr=argument_of(optimizer_class, "lr", self.optimizer_cfg),
            base_decay=argument_of(optimizer_class, "weight_decay", self.optimizer_cfg),
            known=arguments_of(optimizer_class).names,
            path=f"{self.path}.paramwise_cfg",
        )
        return group_parameters(model, rules)

    def __call__(self, model: nn.Module) -> OptimWrapper:
        model = model.module if isinstance(getattr(model, "module", None), nn.Module) else model  # type: ignore[assignment]
        optimizer = self.optimizer_cfg
        if not isinstance(optimizer, Optimizer):
            optimizer = self._make_optimizer(model)
        wrapper = _wrap(optimizer, self.wrapper_cfg, self.path)
        wrapper.notices += self.notices
        return wrapper

    def _make_optimizer(self, model: nn.Module) -> Optimizer:
        path = f"{self.path}.optimizer"
        if "type" not in self.optimizer_cfg:
            raise config_error(path, "'type' is missing, expected the name of an optimizer such as 'AdamW'")
        cls = resolve(OPTIMIZERS, self.optimizer_cfg["type"], path=f"{path}.type")
        groups = self.make_groups(model, cls)
        if not groups:
            raise config_error(path, "the model has no trainable parameter: nothing would be optimized")
        for group in groups:  # torch would not let a hook add a group without names to one with names
            group.pop("param_names", None)
        # The first argument need not be called `params`.
        arguments: dict[str, Any] = {next(iter(inspect.signature(cls).parameters)): groups}
        parameters = [parameter for group in groups for parameter in group["params"]]
        fusing = fusing_of(cls, self.optimizer_cfg, model, parameters, path=path)
        self.notices = [fusing.notice] if fusing.notice else []
        cfg = {**self.optimizer_cfg, "fused": True} if fusing.use else self.optimizer_cfg
        optimizer = build(OPTIMIZERS, cfg, path=path, **arguments)
        if fusing.use:
            begin_late_momentum(optimizer)
        return optimizer


def _wrap(optimizer: Optimizer, wrapper_cfg: Mapping[str, Any], path: str) -> OptimWrapper:
    wrapper = build(OPTIM_WRAPPERS, wrapper_cfg, path=path, type="OptimWrapper", optimizer=optimizer)
    if not isinstance(wrapper, OptimWrapper):
        raise config_error(f"{path}.type", f"{type(wrapper).__name__} does not derive from mmtrain.optim.OptimWrapper")
    return wrapper


def scale_lr(cfg: Mapping[str, Any] | None, optim: OptimWrapper, *, effective_batch: int) -> str | None:
    """Scale the learning rates to the batch, as ``auto_scale_lr`` says; returns a sentence about it, or None.

    ``cfg``: ``enable``, ``base_batch_size`` (the samples of one update for which the config's ``lr`` was chosen) and
    ``rule``: 'linear' (https://arxiv.org/abs/1706.02677) or 'sqrt' (square root of the ratio, the rule for adaptive
    optimizers, https://arxiv.org/abs/2205.10287). To be called before the schedules are built. Raises ConfigError.
    """
    if cfg is None:
        return None
    for key in cfg:
        if key not in _SCALE_KEYS:
            hint = did_you_mean(key, _SCALE_KEYS) or f", expected {', '.join(_SCALE_KEYS)}"
            raise config_error(f"auto_scale_lr.{key}", f"unknown key{hint}")
    if not cfg.get("enable", False):
        return None
    base, rule = cfg.get("base_batch_size"), cfg.get("rule", "linear")
    if not isinstance(base, int | float) or base <= 0:
        raise config_error("auto_scale_lr.base_batch_size", f"found {base!r}, expected a number of samples above 0")
    if rule not in ("linear", "sqrt"):
        raise config_error("auto_scale_lr.rule", f"found {rule!r}, expected 'linear' or 'sqrt'")
    ratio = effective_batch / base
    factor = ratio if rule == "linear" else ratio**0.5
    for group in _all_groups(optim):
        for key in ("lr", "initial_lr"):
            if isinstance(group.get(key), Tensor):
                group[key].mul_(factor)
            elif key in group:
                group[key] *= factor
    return (
        f"auto_scale_lr: one update has {effective_batch} samples, base_batch_size is {base}: "
        f"every lr is multiplied by {factor:g} ({rule})"
    )


def _all_groups(optim: OptimWrapper) -> list[Group]:
    wrappers = list(optim.values()) if isinstance(optim, OptimWrapperDict) else [optim]
    return [g for w in wrappers for g in [*w.optimizer.param_groups, *([w.base_group] if w.base_group else [])]]
