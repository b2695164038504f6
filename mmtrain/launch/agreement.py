"""Whether all ranks are about to do the same thing with the same things."""

import platform
import sys
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from mmtrain.config import fingerprint
from mmtrain.errors import ConfigError


def refuse_disagreement(cfg: Any) -> None:
    """Compare config, versions and code over ranks; a collective. Raises ConfigError, on every rank, for a difference.

    Code is mmtrain itself and the modules that ``custom_imports`` names.
    """
    from mmtrain import dist

    if dist.world_size() > 1:
        refuse_difference(_facts(cfg), "start all ranks with the same files, in the same environment")


def refuse_difference(facts: Mapping[str, str], remedy: str) -> None:
    """Compare facts by name over ranks; a collective. Raises ConfigError that names the first one that differs."""
    from mmtrain import dist

    everyone = dist.gather_objects(dict(facts))
    for rank, others in enumerate(everyone):
        for name, value in others.items():
            if value != everyone[0].get(name):
                raise ConfigError(
                    f"rank {rank} has another {name} than rank 0: {value} instead of {everyone[0].get(name)}; {remedy}"
                )


def _facts(cfg: Any) -> dict[str, str]:
    import torch

    import mmtrain

    facts = {"python": platform.python_version(), "torch": torch.__version__, "mmtrain": mmtrain.__version__}
    try:
        facts["config (fingerprint)"] = fingerprint(cfg)
    except ConfigError:  # a config made in Python, which holds objects
        facts["config (keys)"] = ", ".join(sorted(map(str, cfg)))
    facts["code of mmtrain (hash)"] = _own_code()
    imports = (cfg.get("custom_imports") or {}).get("imports") or []
    for name in [imports] if isinstance(imports, str) else imports:
        path = getattr(sys.modules.get(name), "__file__", None)
        if path is not None:
            facts[f"code of {name} (hash)"] = _hash([Path(path)])
    return facts


@lru_cache(maxsize=1)
def _own_code() -> str:
    return _hash(Path(__file__).parents[1].rglob("*.py"))


def _hash(paths: Iterable[Path]) -> str:
    """One hash of the contents of files, in the order of their names."""
    from mmtrain.files import hash_bytes

    return hash_bytes(b"".join(path.read_bytes() for path in sorted(paths)))
