"""Hooks whose work the train loop does. Their names remain, so that configs written for MMEngine keep their meaning."""

from mmtrain.hooks.base import Hook
from mmtrain.registry import HOOKS


@HOOKS.register_module()
class RuntimeInfoHook(Hook):
    """The loop keeps the position and records losses itself."""

    priority = "VERY_HIGH"


@HOOKS.register_module()
class IterTimerHook(Hook):
    """The loop measures ``time`` and ``data_time`` itself; LoggerHook computes the ETA."""

    priority = "NORMAL"


@HOOKS.register_module()
class DistSamplerSeedHook(Hook):
    """The order of the data is a function of seed and position, so no sampler needs to know the epoch."""

    priority = "NORMAL"


@HOOKS.register_module()
class ParamSchedulerHook(Hook):
    """The loop sets lr and momentum from the position at every update."""

    priority = "LOW"
