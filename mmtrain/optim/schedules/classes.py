"""The schedules under the names that configs use: MMEngine's, each for the learning rate, momentum or any group value.

``LR`` sets ``lr``, ``Momentum`` sets ``momentum`` (``betas[0]`` in optimizers that have betas), ``ParamScheduler`` sets
the group value named by its argument ``param_name`` (``weight_decay``, say). The shapes, their arguments and formulas
are in `mmtrain.optim.schedules.curves`. ``WarmupCosine`` is the one form that MMEngine does not have.
"""

from dataclasses import dataclass, field

from mmtrain.optim.schedules import curves
from mmtrain.registry import PARAM_SCHEDULERS


@PARAM_SCHEDULERS.register_module()
class ConstantLR(curves.Constant):
    """The learning rate by a constant multiple: `mmtrain.optim.schedules.curves.Constant`."""


@PARAM_SCHEDULERS.register_module()
@dataclass(kw_only=True, eq=False)
class ConstantMomentum(curves.Constant):
    """The momentum by a constant multiple: `mmtrain.optim.schedules.curves.Constant`."""

    param_name: str = field(default="momentum", init=False)


@PARAM_SCHEDULERS.register_module()
@dataclass(kw_only=True, eq=False)
class ConstantParamScheduler(curves.Constant):
    """Any group value by a constant multiple: `mmtrain.optim.schedules.curves.Constant`."""

    param_name: str = field()


@PARAM_SCHEDULERS.register_module()
class LinearLR(curves.Linear):
    """The learning rate by a linear warm-up or decay: `mmtrain.optim.schedules.curves.Linear`."""


@PARAM_SCHEDULERS.register_module()
@dataclass(kw_only=True, eq=False)
class LinearMomentum(curves.Linear):
    """The momentum by a linear warm-up or decay: `mmtrain.optim.schedules.curves.Linear`."""

    param_name: str = field(default="momentum", init=False)


@PARAM_SCHEDULERS.register_module()
@dataclass(kw_only=True, eq=False)
class LinearParamScheduler(curves.Linear):
    """Any group value by a linear warm-up or decay: `mmtrain.optim.schedules.curves.Linear`."""

    param_name: str = field()


@PARAM_SCHEDULERS.register_module()
class ExponentialLR(curves.Exponential):
    """The learning rate by an exponential decay: `mmtrain.optim.schedules.curves.Exponential`."""


@PARAM_SCHEDULERS.register_module()
@dataclass(kw_only=True, eq=False)
class ExponentialMomentum(curves.Exponential):
    """The momentum by an exponential decay: `mmtrain.optim.schedules.curves.Exponential`."""

    param_name: str = field(default="momentum", init=False)


@PARAM_SCHEDULERS.register_module()
@dataclass(kw_only=True, eq=False)
class ExponentialParamScheduler(curves.Exponential):
    """Any group value by an exponential decay: `mmtrain.optim.schedules.curves.Exponential`."""

    param_name: str = field()


@PARAM_SCHEDULERS.register_module()
class StepLR(curves.Step):
    """The learning rate by a decay every so many steps: `mmtrain.optim.schedules.curves.Step`."""


@PARAM_SCHEDULERS.register_module()
@dataclass(kw_only=True, eq=False)
class StepMomentum(curves.Step):
    """The momentum by a decay every so many steps: `mmtrain.optim.schedules.curves.Step`."""

    param_name: str = field(default="momentum", init=False)


@PARAM_SCHEDULERS.register_module()
@dataclass(kw_only=True, eq=False)
class StepParamScheduler(curves.Step):
    """Any group value by a decay every so many steps: `mmtrain.optim.schedules.curves.Step`."""

    param_name: str = field()


@PARAM_SCHEDULERS.register_module()
class MultiStepLR(curves.MultiStep):
    """The learning rate by a decay at milestones: `mmtrain.optim.schedules.curves.MultiStep`."""


@PARAM_SCHEDULERS.register_module()
@dataclass(kw_only=True, eq=False)
class MultiStepMomentum(curves.MultiStep):
    """The momentum by a decay at milestones: `mmtrain.optim.schedules.curves.MultiStep`."""

    param_name: str = field(default="momentum", init=False)


@PARAM_SCHEDULERS.register_module()
@dataclass(kw_only=True, eq=False)
class MultiStepParamScheduler(curves.MultiStep):
    """Any group value by a decay at milestones: `mmtrain.optim.schedules.curves.MultiStep`."""

    param_name: str = field()


@PARAM_SCHEDULERS.register_module()
class PolyLR(curves.Poly):
    """The learning rate by a polynomial decay: `mmtrain.optim.schedules.curves.Poly`."""


@PARAM_SCHEDULERS.register_module()
@dataclass(kw_only=True, eq=False)
class PolyMomentum(curves.Poly):
    """The momentum by a polynomial decay: `mmtrain.optim.schedules.curves.Poly`."""

    param_name: str = field(default="momentum", init=False)


@PARAM_SCHEDULERS.register_module()
@dataclass(kw_only=True, eq=False)
class PolyParamScheduler(curves.Poly):
    """Any group value by a polynomial decay: `mmtrain.optim.schedules.curves.Poly`."""

    param_name: str = field()


@PARAM_SCHEDULERS.register_module()
class CosineAnnealingLR(curves.CosineAnnealing):
    """The learning rate by a cosine: `mmtrain.optim.schedules.curves.CosineAnnealing`."""


@PARAM_SCHEDULERS.register_module()
@dataclass(kw_only=True, eq=False)
class CosineAnnealingMomentum(curves.CosineAnnealing):
    """The momentum by a cosine: `mmtrain.optim.schedules.curves.CosineAnnealing`."""

    param_name: str = field(default="momentum", init=False)


@PARAM_SCHEDULERS.register_module()
@dataclass(kw_only=True, eq=False)
class CosineAnnealingParamScheduler(curves.CosineAnnealing):
    """Any group value by a cosine: `mmtrain.optim.schedules.curves.CosineAnnealing`."""

    param_name: str = field()


@PARAM_SCHEDULERS.register_module()
class CosineRestartLR(curves.CosineRestart):
    """The learning rate by cosines with restarts: `mmtrain.optim.schedules.curves.CosineRestart`."""


@PARAM_SCHEDULERS.register_module()
@dataclass(kw_only=True, eq=False)
class CosineRestartMomentum(curves.CosineRestart):
    """The momentum by cosines with restarts: `mmtrain.optim.schedules.curves.CosineRestart`."""

    param_name: str = field(default="momentum", init=False)


@PARAM_SCHEDULERS.register_module()
@dataclass(kw_only=True, eq=False)
class CosineRestartParamScheduler(curves.CosineRestart):
    """Any group value by cosines with restarts: `mmtrain.optim.schedules.curves.CosineRestart`."""

    param_name: str = field()


@PARAM_SCHEDULERS.register_module()
class OneCycleLR(curves.OneCycle):
    """The learning rate by one cycle up and down: `mmtrain.optim.schedules.curves.OneCycle`."""


@PARAM_SCHEDULERS.register_module()
@dataclass(kw_only=True, eq=False)
class OneCycleParamScheduler(curves.OneCycle):
    """Any group value by one cycle up and down: `mmtrain.optim.schedules.curves.OneCycle`."""

    param_name: str = field()


@PARAM_SCHEDULERS.register_module()
class WarmupCosineLR(curves.WarmupCosine):
    """The learning rate by a linear warm-up, then a cosine: `mmtrain.optim.schedules.curves.WarmupCosine`."""


@PARAM_SCHEDULERS.register_module()
@dataclass(kw_only=True, eq=False)
class WarmupCosineParamScheduler(curves.WarmupCosine):
    """Any group value by a linear warm-up, then a cosine: `mmtrain.optim.schedules.curves.WarmupCosine`."""

    param_name: str = field()
