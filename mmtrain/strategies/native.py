"""Checkpoints in the format of an engine, for callers that do not know which engine wrote them.

A manifest's ``native`` entry is the description that `Strategy.native` gave. DeepSpeed is the only such engine today.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from mmtrain.checkpoint import Checkpoint
from mmtrain.checkpoint.reader import saved_dtype
from mmtrain.strategies.base import SavedTensor
from mmtrain.strategies.zero import universal


def title(description: Mapping[str, Any]) -> str:
    """The engine's settings that a user knows: ``ZeRO stage 2, 4 processes``."""
    return f"ZeRO stage {description['stage']}, {description['world']} processes"


def open_by_name(checkpoint: Path, description: Mapping[str, Any], *, room: Path) -> AbstractContextManager[Any]:
    """Open a checkpoint in an engine's format to read its tensors by name; a collective.

    Files are converted in a temporary folder of ``room``, which all ranks must see. Raises CheckpointError if they
    cannot be converted.
    """
    return universal.opened(checkpoint, description, room=room)


def saved_tensors(source: Checkpoint | universal.Universal, section: str) -> dict[str, SavedTensor]:
    """Shape and type of each tensor in a section of a checkpoint, or of what `open_by_name` gave."""
    if isinstance(source, universal.Universal):
        return source.saved(section)
    infos = {name: source.tensor_info(section, name) for name in source.tensor_names(section)}
    return {name: SavedTensor(info.shape, saved_dtype(info)) for name, info in infos.items()}


def remove_leftovers(root: Path) -> None:
    """Remove the temporary folders of killed runs from ``root``; for a run that holds the lock of ``root``."""
    universal.remove_leftovers(root)
