"""Small files beside checkpoints, each written atomically: JSON records, and weights for other programs."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mmtrain import files
from mmtrain.checkpoint.write.storage import remove_tree
from mmtrain.errors import CheckpointError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write a file or a directory to; a rename puts it in the place of ``path`` after the block.

    A reader finds all of it or nothing, and a file is on the disk before it is found. Raises CheckpointError if it
    cannot be written; what was there before stays. A directory does not replace one that has files.
    """
    # A directory, because safetensors writes beside its target too, under a name that is
    # unknown after a kill. One run writes here at a time, and clears away what a killed one left.
    folder = path.with_name(f".{path.name}.tmp")
    aside = folder / path.name
    try:
        _clear(folder)
        folder.mkdir(parents=True)
        with files.replacing(path, aside=aside):
            yield aside
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save reports a full disk as a RuntimeError
        raise CheckpointError(f"{path} could not be written: {error}") from error
    finally:
        _clear(folder)


def _clear(path: Path) -> None:
    """Delete a folder; a link in its place is deleted, not followed."""
    with contextlib.suppress(OSError):
        remove_tree(path, files.LocalFiles())


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file by a rename, so that a reader finds the old one or the new one."""
    with replacing(path) as aside:
        aside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as one safetensors file that `safetensors.torch.load_file` reads; tied tensors are written twice.

    Raises CheckpointError if the file cannot be written; the one that was there before stays.
    """
    seen: set[int] = set()
    plain = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        if value.numel() and value.data_ptr() in seen:  # the format has no shared memory
            value = value.clone()
        seen.add(value.data_ptr())
        plain[name] = value
    with replacing(path) as aside:
        save_file(plain, aside, metadata={"format": "pt"})
