"""Parameter groups with multipliers by name and kind: MMEngine's ``paramwise_cfg``.

The rules are those of ``mmengine/optim/optimizer/default_constructor.py`` 0.10.7. Three things differ: parameters with
equal settings share one group (MMEngine makes one group for each parameter, which keeps fused and foreach kernels from
working on more than one tensor at a time), a multiplier of 0 for the learning rate freezes, and ``torch.nn.RMSNorm``
counts as a normalization layer.
"""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from mmtrain.source_lines import config_error
from mmtrain.suggest import did_you_mean

_MULTIPLIERS = (
    "bias_lr_mult",
    "bias_decay_mult",
    "norm_decay_mult",
    "flat_decay_mult",
    "dwconv_decay_mult",
    "dcn_offset_lr_mult",
)
_KNOWN = (*_MULTIPLIERS, "custom_keys", "bypass_duplicate")
_NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm, *([nn.RMSNorm] if hasattr(nn, "RMSNorm") else []))
_DCN_NAMES = ("DeformConv2d", "ModulatedDeformConv2d")

Group = dict[str, Any]


class ParamwiseRules:
    """The settings of each parameter under one ``paramwise_cfg``.

    ``base_lr`` and ``base_decay`` are the optimizer's ``lr`` and ``weight_decay``, or None if it has none; ``known``
    are the optimizer's arguments, near which an unknown key of ``custom_keys`` is a misspelling. Raises ConfigError.
    """

    def __init__(
        self,
        cfg: Mapping[str, Any],
        *,
        base_lr: float | None,
        base_decay: float | None,
        known: Iterable[str] = (),
        path: str = "optim_wrapper.paramwise_cfg",
    ) -> None:
        self.cfg, self.base_lr, self.base_decay, self.path = cfg, base_lr, base_decay, path
        self.known = tuple(known)
        self.custom: Mapping[str, Mapping[str, Any]] = cfg.get("custom_keys") or {}
        # The longest key wins, among equally long ones the first by the alphabet.
        self.keys = sorted(sorted(self.custom), key=len, reverse=True)
        self._check()

    def _check(self) -> None:
        for key in self.cfg:
            if key not in _KNOWN:
                hint = did_you_mean(key, _KNOWN) or f", expected one of {', '.join(_KNOWN)}"
                raise config_error(f"{self.path}.{key}", f"unknown key{hint}")
        needs = [key for key in _MULTIPLIERS if self.cfg.get(key) is not None]
        for key, own in self.custom.items():
            where = f"{self.path}.custom_keys[{key!r}]"
            if not isinstance(own, Mapping):
                raise config_error(where, f"expected a dict such as dict(lr_mult=0.1), found {own!r}")
            for name in own:
                known = ("lr_mult", "decay_mult", *self.known)
                if name not in known and (hint := did_you_mean(name, known)):
                    raise config_error(f"{where}.{name}", f"unknown key{hint}")
            needs += [name for name in ("lr_mult", "decay_mult") if name in own]
        for kind, base, argument in (("lr_mult", self.base_lr, "lr"), ("decay_mult", self.base_decay, "weight_decay")):
            if base is None and (asking := [name for name in needs if name.endswith(kind)]):
                raise config_error(self.path, f"{asking[0]} multiplies {argument}, which this optimizer does not have")

    def settings(self, module: nn.Module, prefix: str, name: str, in_dcn: bool) -> Group:
        """What differs from the optimizer's defaults for one parameter; ``frozen`` where its ``lr_mult`` is 0."""
        for key in self.keys:
            if key in f"{prefix}.{name}":
                return self._custom_settings(self.custom[key])
        settings: Group = {}
        lr_mult = self._lr_mult(module, prefix, name, in_dcn)
        if lr_mult is not None and self.base_lr is not None:
            settings["lr"] = self.base_lr * lr_mult
            settings["frozen"] = lr_mult == 0
        decay_mult = self._decay_mult(module, name, in_dcn)
        if decay_mult is not None and self.base_decay is not None:
            settings["weight_decay"] = self.base_decay * decay_mult
        return settings

    def _custom_settings(self, own: Mapping[str, Any]) -> Group:
        settings: Group = {}
        if self.base_lr is not None:
            settings["lr"] = self.base_lr * own.get("lr_mult", 1.0)
        if self.base_decay is not None:
            settings["weight_decay"] = self.base_decay * own.get("decay_mult", 1.0)
        settings |= {key: value for key, value in own.items() if key not in ("lr_mult", "decay_mult")}
        return settings | {"frozen": own.get("lr_mult", 1.0) == 0}

    def _lr_mult(self, module: nn.Module, prefix: str, name: str, in_dcn: bool) -> float | None:
        if in_dcn and "conv_offset" in prefix and isinstance(module, nn.Conv2d):
            offset = self.cfg.get("dcn_offset_lr_mult")
            if offset is not None:
                return offset
        if name == "bias" and not isinstance(module, _NORMS) and not in_dcn:
            return self.cfg.get("bias_lr_mult")
        return None

    def _decay_mult(self, module: nn.Module, name: str, in_dcn: bool) -> float | None:
        """The first rule that applies and is set: normalization, bias, depthwise convolution, one dimension."""
        parameter = getattr(module, name)
        depthwise = isinstance(module, nn.Conv2d) and module.in_channels == module.groups
        rules = (
            ("norm_decay_mult", isinstance(module, _NORMS)),
            ("bias_decay_mult", name == "bias" and not in_dcn),
            ("dwconv_decay_mult", depthwise),
            ("flat_decay_mult", parameter.ndim == 1 and not in_dcn),
        )
        for key, applies in rules:
            if applies and self.cfg.get(key) is not None:
                return self.cfg[key]
        return None

    def check_used(self, names: Sequence[str]) -> None:
        """Raise ConfigError for a custom key that is part of no parameter's name."""
        for key in self.keys:
            if not any(key in f".{name}" for name in names):
                parts = {".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 2)}
                hint = did_you_mean(key, sorted(parts)) or f"; the first parameters are {', '.join(names[:3])}"
                raise config_error(f"{self.path}.custom_keys[{key!r}]", f"no parameter has it in its name{hint}")


def settings_by_parameter(
    model: nn.Module, rules: ParamwiseRules, *, prefix: str = "", in_dcn: bool = False
) -> list[tuple[str, nn.Parameter, Group]]:
    """Name, parameter and settings of every trainable parameter, a module's own before its children's.

    A parameter that is used in several places appears once, under its first name.
    """
    found: list[tuple[str, nn.Parameter, Group]] = []
    seen: set[int] = set()

    def visit(module: nn.Module, prefix: str, in_dcn: bool) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen and parameter.requires_grad:
                seen.add(id(parameter))
                full = f"{prefix}.{name}" if prefix else name
                found.append((full, parameter, rules.settings(module, prefix, name, in_dcn)))
        is_dcn = any(cls.__name__ in _DCN_NAMES for cls in type(module).__mro__)
        for child_name, child in module.named_children():
            visit(child, f"{prefix}.{child_name}" if prefix else child_name, is_dcn)

    visit(model, prefix, in_dcn)
    return found


def group_parameters(model: nn.Module, rules: ParamwiseRules) -> list[Group]:
    """One group for each set of equal settings, in the order of their first parameter, with ``param_names``.

    Parameters whose multiplier of the learning rate is 0 are frozen (``requires_grad=False``) and left out.
    """
    rules.check_used([name for name, _ in model.named_parameters()])
    groups: list[Group] = []
    for name, parameter, settings in settings_by_parameter(model, rules):
        if settings.pop("frozen", False):
            parameter.requires_grad_(False)
            continue
        group = next((group for group in groups if group["settings"] == settings), None)
        if group is None:
            group = {"settings": settings, "params": [], "param_names": []}
            groups.append(group)
        group["params"].append(parameter)
        group["param_names"].append(name)
    return [{**group.pop("settings"), **group} for group in groups]


def trainable_group(model: nn.Module) -> list[Group]:
    """All trainable parameters as one group, with ``param_names``."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not named:
        return []
    return [{"params": [parameter for _, parameter in named], "param_names": [name for name, _ in named]}]


def argument_of(optimizer: Any, name: str, given: Mapping[str, Any]) -> float | None:
    """An argument of the optimizer: from the config, else the default of its signature, else None."""
    if name in given:
        return given[name]
    parameter = inspect.signature(optimizer).parameters.get(name)
    return parameter.default if parameter and isinstance(parameter.default, int | float) else None
