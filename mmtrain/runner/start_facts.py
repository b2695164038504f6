"""What every rank of a run must have in common at start: versions, config and code."""

import platform
import sys
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import xxhash

from mmtrain.config import config_hash
from mmtrain.errors import ConfigError
from mmtrain.version import __version__


def start_facts(cfg: Any) -> dict[str, str]:
    """Facts by name, for `launch.refuse_difference`. Code is mmtrain's and that of the ``custom_imports``."""
    facts = {
        "Python version": platform.python_version(),
        "torch version": torch.__version__,
        "mmtrain version": __version__,
    }
    try:
        facts["config (hash)"] = config_hash(cfg)
    except ConfigError:  # a config made in Python that holds objects
        facts["config (keys)"] = ", ".join(sorted(map(str, cfg)))
    facts["code of mmtrain (hash)"] = _mmtrain_code()
    imports = (cfg.get("custom_imports") or {}).get("imports") or []
    for name in [imports] if isinstance(imports, str) else imports:
        path = getattr(sys.modules.get(name), "__file__", None)
        if path is not None:
            facts[f"code of {name} (hash)"] = _hash([Path(path)])
    return facts


@lru_cache(maxsize=1)
def _mmtrain_code() -> str:
    return _hash(Path(__file__).parents[1].rglob("*.py"))


def _hash(paths: Iterable[Path]) -> str:
    """One hash of the contents of files, in the order of their names."""
    hasher = xxhash.xxh3_64()
    for path in sorted(paths):
        hasher.update(path.read_bytes())
    return hasher.hexdigest()
