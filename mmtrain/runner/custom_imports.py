"""Imports the modules a config names, so that what they register is found."""

import importlib
import sys
from pathlib import Path
from typing import Any

from mmtrain.errors import ConfigError


def import_custom_modules(cfg: Any) -> None:
    """Import ``custom_imports=dict(imports=[...], allow_failed_imports=False)``.

    The working directory is importable, as it is for ``python script.py``. Raises ConfigError that names the module.
    """
    wanted = cfg.get("custom_imports")
    if not wanted:
        return
    imports = wanted.get("imports") or []
    names = [imports] if isinstance(imports, str) else list(imports)
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            if wanted.get("allow_failed_imports"):
                continue
            raise ConfigError(
                f"custom_imports: cannot import {name!r}: {error}. Put the file's folder on PYTHONPATH or start from "
                "the folder that holds it"
            ) from error
