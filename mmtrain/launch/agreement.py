"""Whether all ranks are about to do the same thing."""

import platform
from typing import Any

from mmtrain.config import fingerprint
from mmtrain.errors import ConfigError


def refuse_disagreement(cfg: Any) -> None:
    """Compare config and versions over ranks; a collective. Raises ConfigError, on every rank, for a difference."""
    from mmtrain import dist

    if dist.world_size() == 1:
        return
    everyone = dist.gather_objects(_facts(cfg))
    for rank, facts in enumerate(everyone):
        for name, value in facts.items():
            if value != everyone[0].get(name):
                raise ConfigError(
                    f"rank {rank} has another {name} than rank 0: {value} instead of {everyone[0].get(name)}; "
                    "start all ranks with the same files, in the same environment"
                )


def _facts(cfg: Any) -> dict[str, str]:
    import torch

    import mmtrain

    facts = {"python": platform.python_version(), "torch": torch.__version__, "mmtrain": mmtrain.__version__}
    try:
        facts["config (fingerprint)"] = fingerprint(cfg)
    except ConfigError:  # a config made in Python, which holds objects
        facts["config (keys)"] = ", ".join(sorted(map(str, cfg)))
    return facts
