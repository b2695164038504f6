"""Small files beside checkpoints, each whole or absent: JSON records, and weights alone for other programs."""

import json
import os
import shutil
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
    # A directory, because safetensors writes beside its target too, under a name that nobody knows after a kill. One
    # run writes here at a time, and clears away what a killed one left.
    aside = path.with_name(f".{path.name}.tmp")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        write(aside / path.name)
        with (aside / path.name).open("rb") as file:
            os.fsync(file.fileno())
        (aside / path.name).replace(path)
    except Exception as error:  # safetensors has an error class of its own for the same faults
        raise CheckpointError(f"{path} could not be written: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
