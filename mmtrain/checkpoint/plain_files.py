"""Small files beside checkpoints, each whole or absent: JSON records, and weights alone for other programs."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from mmtrain.errors import CheckpointError


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file by a rename, so that a reader finds the old one or the new one."""
    text = json.dumps(value, indent=2) + "\n"
    _replace(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as one safetensors file that `safetensors.torch.load_file` reads; tied tensors are written twice.

    Raises CheckpointError where the file cannot be written; the one that was there before stays.
    """
    seen: set[int] = set()
    plain = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        if value.numel() and value.data_ptr() in seen:  # the format has no shared memory
            value = value.clone()
        seen.add(value.data_ptr())
        plain[name] = value
    _replace(path, lambda aside: save_file(plain, aside, metadata={"format": "pt"}))


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    aside = path.with_name(f".{path.name}.tmp")  # one run writes here at a time, and overwrites what a killed one left
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(aside)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    except Exception as error:  # safetensors has an error class of its own for the same faults
        aside.unlink(missing_ok=True)
        raise CheckpointError(f"{path} could not be written: {error}") from error
