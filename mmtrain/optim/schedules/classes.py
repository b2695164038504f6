"""The schedules under the names that configs use: MMEngine's, each for the learning rate, momentum or any group value.

``LR`` sets ``lr``, ``Momentum`` sets ``momentum`` (``betas[0]`` in optimizers that have betas), ``ParamScheduler`` sets
the group value named by its argument ``param_name`` (``weight_decay``, say). The shapes, their arguments and formulas
are in `mmtrain.optim.schedules.curves`. ``WarmupCosine`` is the one form that MMEngine does not have.
"""

from dataclasses import dataclass, field
from typing import TypeVar

from mmtrain.optim.schedules import curves
from mmtrain.registry import PARAM_SCHEDULERS

T = TypeVar("T")


@dataclass(kw_only=True, eq=False)
class _OfMomentum:
    """Combined with a curve: a schedule of the momentum."""

    param_name: str = field(default="momentum", init=False)


@dataclass(kw_only=True, eq=False)
class _OfAnyValue:
    """Combined with a curve: a schedule of the group value that the argument ``param_name`` names."""

    param_name: str


def _schedule(cls: type[T]) -> type[T]:
    """Register a schedule whose arguments are those of its bases."""
    return PARAM_SCHEDULERS.register_module()(dataclass(kw_only=True, eq=False)(cls))


@_schedule
class ConstantLR(curves.Constant):
    """The learning rate by a constant multiple: `curves.Constant`."""


@_schedule
class ConstantMomentum(_OfMomentum, curves.Constant):
    """The momentum by a constant multiple: `curves.Constant`."""


@_schedule
class ConstantParamScheduler(_OfAnyValue, curves.Constant):
    """Any group value by a constant multiple: `curves.Constant`."""


@_schedule
class LinearLR(curves.Linear):
    """The learning rate by a linear warm-up or decay: `curves.Linear`."""


@_schedule
class LinearMomentum(_OfMomentum, curves.Linear):
    """The momentum by a linear warm-up or decay: `curves.Linear`."""


@_schedule
class LinearParamScheduler(_OfAnyValue, curves.Linear):
    """Any group value by a linear warm-up or decay: `curves.Linear`."""


@_schedule
class ExponentialLR(curves.Exponential):
    """The learning rate by an exponential decay: `curves.Exponential`."""


@_schedule
class ExponentialMomentum(_OfMomentum, curves.Exponential):
    """The momentum by an exponential decay: `curves.Exponential`."""


@_schedule
class ExponentialParamScheduler(_OfAnyValue, curves.Exponential):
    """Any group value by an exponential decay: `curves.Exponential`."""


@_schedule
class StepLR(curves.Step):
    """The learning rate by a decay every so many steps: `curves.Step`."""


@_schedule
class StepMomentum(_OfMomentum, curves.Step):
    """The momentum by a decay every so many steps: `curves.Step`."""


@_schedule
class StepParamScheduler(_OfAnyValue, curves.Step):
    """Any group value by a decay every so many steps: `curves.Step`."""


@_schedule
class MultiStepLR(curves.MultiStep):
    """The learning rate by a decay at milestones: `curves.MultiStep`."""


@_schedule
class MultiStepMomentum(_OfMomentum, curves.MultiStep):
    """The momentum by a decay at milestones: `curves.MultiStep`."""


@_schedule
class MultiStepParamScheduler(_OfAnyValue, curves.MultiStep):
    """Any group value by a decay at milestones: `curves.MultiStep`."""


@_schedule
class PolyLR(curves.Poly):
    """The learning rate by a polynomial decay: `curves.Poly`."""


@_schedule
class PolyMomentum(_OfMomentum, curves.Poly):
    """The momentum by a polynomial decay: `curves.Poly`."""


@_schedule
class PolyParamScheduler(_OfAnyValue, curves.Poly):
    """Any group value by a polynomial decay: `curves.Poly`."""


@_schedule
class CosineAnnealingLR(curves.CosineAnnealing):
    """The learning rate by a cosine: `curves.CosineAnnealing`."""


@_schedule
class CosineAnnealingMomentum(_OfMomentum, curves.CosineAnnealing):
    """The momentum by a cosine: `curves.CosineAnnealing`."""


@_schedule
class CosineAnnealingParamScheduler(_OfAnyValue, curves.CosineAnnealing):
    """Any group value by a cosine: `curves.CosineAnnealing`."""


@_schedule
class CosineRestartLR(curves.CosineRestart):
    """The learning rate by cosines with restarts: `curves.CosineRestart`."""


@_schedule
class CosineRestartMomentum(_OfMomentum, curves.CosineRestart):
    """The momentum by cosines with restarts: `curves.CosineRestart`."""


@_schedule
class CosineRestartParamScheduler(_OfAnyValue, curves.CosineRestart):
    """Any group value by cosines with restarts: `curves.CosineRestart`."""


@_schedule
class OneCycleLR(curves.OneCycle):
    """The learning rate by one cycle up and down: `curves.OneCycle`."""


@_schedule
class OneCycleParamScheduler(_OfAnyValue, curves.OneCycle):
    """Any group value by one cycle up and down: `curves.OneCycle`."""


@_schedule
class WarmupCosineLR(curves.WarmupCosine):
    """The learning rate by a linear warm-up, then a cosine: `curves.WarmupCosine`."""


@_schedule
class WarmupCosineParamScheduler(_OfAnyValue, curves.WarmupCosine):
    """Any group value by a linear warm-up, then a cosine: `curves.WarmupCosine`."""
