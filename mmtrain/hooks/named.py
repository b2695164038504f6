"""Hooks whose work the train loop does: their names stay, so that configs written for MMEngine keep their meaning."""

from mmtrain.hooks.base import Hook
from mmtrain.registry import HOOKS


@HOOKS.register_module()
class RuntimeInfoHook(Hook):
    """The loop keeps the position and records losses itself."""

    priority = "VERY_HIGH"


@HOOKS.register_module()
class IterTimerHook(Hook):
    """The loop measures ``time`` and ``data_time`` itself; LoggerHook works out the ETA."""

    priority = "NORMAL"


@HOOKS.register_module()
class DistSamplerSeedHook(Hook):
    """The order of the data is a function of seed and position; nothing has to be told the epoch."""

    priority = "NORMAL"


@HOOKS.register_module()
class ParamSchedulerHook(Hook):
    """The loop sets lr and momentum from the position at every update."""

    priority = "LOW"
