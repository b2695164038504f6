"""Reducing a value when a metric has stopped improving: the only schedule with a state."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmtrain.errors import RunError
from mmtrain.optim.schedules.schedule import Horizon, Schedule
from mmtrain.registry import PARAM_SCHEDULERS


@dataclass(kw_only=True, eq=False)
class ReduceOnPlateau(Schedule):
    """Multiplied by ``factor`` when ``monitor`` has not improved for more than ``patience`` validations.

    Arguments and rules are MMEngine's (PyTorch's ``ReduceLROnPlateau``): ``rule`` 'less' or 'greater' is better,
    ``threshold`` (``threshold_rule`` 'rel' or 'abs') is the smallest change that counts, ``cooldown`` validations pass
    after a reduction, ``min_value`` (one number, or one for each group) is a lower bound, and a change of ``eps`` or
    less is not made. ``begin`` and ``end`` are the epochs between which validations count.

    The state holds how often the value was reduced, not the value: that is computed from today's config. It acts on
    what the other schedules of the same value give.
    """

    monitor: str = "loss"
    rule: str = "less"
    factor: float = 0.1
    patience: int = 10
    threshold: float = 1e-4
    threshold_rule: str = "rel"
    cooldown: int = 0
    min_value: float | Sequence[float] = 0.0
    eps: float = 1e-8

    chainable = False

    def __post_init__(self) -> None:
        self.best: float | None = None
        self.bad = 0
        self.cooling = 0
        self.reductions = 0

    def place(self, horizon: Horizon, path: str) -> None:
        self.path = path
        self._check_span()
        if not self.by_epoch or self.convert_to_iter_based:
            self.refuse("it runs by validations: expected by_epoch=True and no convert_to_iter_based")
        if self.factor >= 1:
            self.refuse(f"factor is {self.factor}, expected less than 1")
        if self.threshold < 0:
            self.refuse(f"threshold is {self.threshold}, expected 0 or more")
        if self.rule not in ("less", "greater"):
            self.refuse(f"rule is {self.rule!r}, expected 'less' or 'greater'")
        if self.threshold_rule not in ("rel", "abs"):
            self.refuse(f"threshold_rule is {self.threshold_rule!r}, expected 'rel' or 'abs'")
        self.epoch_unit = True

    def bounds(self, groups: int) -> list[float]:
        """The lower bound of every group."""
        if isinstance(self.min_value, int | float):
            return [float(self.min_value)] * groups
        if len(self.min_value) != groups:
            self.refuse(f"min_value has {len(self.min_value)} values, expected one for each of the {groups} groups")
        return [float(value) for value in self.min_value]

    def observe(self, metrics: Mapping[str, Any], epochs: int) -> None:
        """Take in the metrics of a validation after ``epochs`` complete epochs. Raises RunError without ``monitor``."""
        if not self.begin <= epochs < (math.inf if self.end is None else self.end):
            return
        if self.monitor not in metrics:
            names = ", ".join(sorted(metrics)) or "none"
            raise RunError(f"{self.path}.monitor: validation did not report {self.monitor!r}; it reported: {names}")
        value = float(metrics[self.monitor])
        if self._improves(value):
            self.best, self.bad = value, 0
        else:
            self.bad += 1
        if self.cooling > 0:
            self.cooling -= 1
            self.bad = 0
        if self.bad > self.patience:
            self.reductions += 1
            self.cooling, self.bad = self.cooldown, 0

    def _improves(self, value: float) -> bool:
        if self.best is None:
            return not math.isnan(value)
        sign = -1 if self.rule == "less" else 1
        margin = self.threshold if self.threshold_rule == "abs" else self.best * self.threshold
        return sign * value > sign * (self.best + sign * margin)

    def reduced(self, value: float, bound: float) -> float:
        """The value after all reductions so far."""
        for _ in range(self.reductions):
            lower = max(value * self.factor, bound)
            if value - lower <= self.eps:
                break
            value = lower
        return value

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "bad": self.bad, "cooling": self.cooling, "reductions": self.reductions}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.best = state_dict["best"]
        self.bad, self.cooling, self.reductions = (int(state_dict[k]) for k in ("bad", "cooling", "reductions"))


@PARAM_SCHEDULERS.register_module()
class ReduceOnPlateauLR(ReduceOnPlateau):
    """The learning rate, reduced when a metric stops improving: `ReduceOnPlateau`."""


@PARAM_SCHEDULERS.register_module()
@dataclass(kw_only=True, eq=False)
class ReduceOnPlateauMomentum(ReduceOnPlateau):
    """The momentum, reduced when a metric stops improving: `ReduceOnPlateau`."""

    param_name: str = field(default="momentum", init=False)


@PARAM_SCHEDULERS.register_module()
@dataclass(kw_only=True, eq=False)
class ReduceOnPlateauParamScheduler(ReduceOnPlateau):
    """Any group value, reduced when a metric stops improving: `ReduceOnPlateau`."""

    param_name: str = field()
