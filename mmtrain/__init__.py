"""mmtrain: MMEngine-style training whose resume is exact to the bit.

The names most scripts need are ``FlexibleRunner``, ``load_config`` and ``Hook``; they are imported when first used, so
that ``import mmtrain`` costs nothing.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "FlexibleRunner": "mmtrain.runner",
    "Hook": "mmtrain.hooks",
    "load_config": "mmtrain.config",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'mmtrain' has no attribute {name!r}")
