"""mmtrain: MMEngine-style training whose resume is exact bit-for-bit.

The names below are what most projects need. They are imported when first used, so that ``import mmtrain`` is free; the
rest is in the packages, each of which says in its docstring what it is for (docs/architecture.md draws them).
"""

import importlib
from typing import TYPE_CHECKING, Any

from mmtrain.version import __version__ as __version__

if TYPE_CHECKING:
    from mmengine.config import Config as Config

    from mmtrain.checkpoint import CheckpointStore as CheckpointStore
    from mmtrain.checkpoint import load_weights as load_weights
    from mmtrain.config import load_config as load_config
    from mmtrain.errors import CheckpointError as CheckpointError
    from mmtrain.errors import ConfigError as ConfigError
    from mmtrain.errors import RunError as RunError
    from mmtrain.hooks import Hook as Hook
    from mmtrain.optim import OptimWrapper as OptimWrapper
    from mmtrain.optim import Schedule as Schedule
    from mmtrain.registry import DATASETS as DATASETS
    from mmtrain.registry import HOOKS as HOOKS
    from mmtrain.registry import METRICS as METRICS
    from mmtrain.registry import MODELS as MODELS
    from mmtrain.runner import FlexibleRunner as FlexibleRunner
    from mmtrain.runner import Runner as Runner
    from mmtrain.runner import TrainLoop as TrainLoop
    from mmtrain.strategies import Strategy as Strategy

_MODULES = {
    "CheckpointError": "mmtrain.errors",
    "CheckpointStore": "mmtrain.checkpoint",
    "Config": "mmengine.config",
    "ConfigError": "mmtrain.errors",
    "DATASETS": "mmtrain.registry",
    "FlexibleRunner": "mmtrain.runner",
    "HOOKS": "mmtrain.registry",
    "Hook": "mmtrain.hooks",
    "METRICS": "mmtrain.registry",
    "MODELS": "mmtrain.registry",
    "OptimWrapper": "mmtrain.optim",
    "RunError": "mmtrain.errors",
    "Runner": "mmtrain.runner",
    "Schedule": "mmtrain.optim",
    "Strategy": "mmtrain.strategies",
    "TrainLoop": "mmtrain.runner",
    "load_config": "mmtrain.config",
    "load_weights": "mmtrain.checkpoint",
}

__all__ = ["__version__", *_MODULES]  # noqa: PLE0604 - names of the table


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'mmtrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
