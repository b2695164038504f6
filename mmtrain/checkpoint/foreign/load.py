"""Loads weights from mmtrain checkpoints, MMEngine's, plain state dicts, safetensors, Hugging Face and DeepSpeed.

Only tensors are taken, and nothing in a file is ever run: pickles go through `safe_pickle`. The optimizer and position
of another program are not read; only an mmtrain checkpoint can be resumed.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmtrain.checkpoint.foreign import deepspeed_files, safe_pickle
from mmtrain.checkpoint.foreign.fetch import fetched
from mmtrain.checkpoint.foreign.matching import revise
from mmtrain.checkpoint.format.manifest import MANIFEST
from mmtrain.checkpoint.reader import open_checkpoint
from mmtrain.errors import CheckpointError
from mmtrain.files import check_regular, read_bounded
from mmtrain.printable import reason

_INDEX = ".index.json"
_INDEX_LIMIT = 64 << 20  # bytes
_LONGEST_NAME = 255  # bytes on common file systems
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "model_state")
_HF_FILES = (
    "model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin",
    "diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.safetensors",
    "adapter_model.safetensors", "adapter_model.bin",
)  # fmt: skip


@dataclass(slots=True)
class Weights:
    """Tensors on the CPU by name, the kind of source they came from, and what in it was ignored."""

    tensors: dict[str, Tensor]
    kind: str
    source: str
    ignored: list[str] = field(default_factory=list)


def load_weights(
    source: str | Path,
    *,
    revise_keys: Sequence[tuple[str, str]] = ((r"^module\.", ""),),
    section: str = "model",
    verify: bool = True,
) -> Weights:
    """Read weights from a path, ``https://``, ``file://`` or any address that fsspec knows.

    ``revise_keys`` are MMEngine's (pattern, replacement) pairs; the default strips the prefix of data-parallel
    wrappers. ``section`` chooses a section of an mmtrain checkpoint. ``verify`` compares its hashes first.

    Raises CheckpointError for a source that is missing, damaged, of an unknown kind, or contains code.
    """
    try:
        with fetched(str(source)) as path:
            weights = _read(path, section=section, verify=verify)
    except CheckpointError:
        raise
    except Exception as error:  # files of unknown origin: each library that reads them has errors of its own
        raise CheckpointError(f"{source}: it cannot be read as weights ({reason(error)})") from error
    weights.source = str(source)
    names = revise(weights.tensors, revise_keys)
    weights.tensors = {names[name]: tensor for name, tensor in weights.tensors.items()}
    return weights


def _read(path: Path, *, section: str, verify: bool) -> Weights:
    if not os.path.exists(path):  # noqa: PTH110 - unlike Path.exists it takes any name
        raise CheckpointError(f"{path}: no such file or directory")
    if not path.is_dir():
        return _read_file(path)
    if (path / MANIFEST).exists():
        checkpoint = open_checkpoint(path, verify="full" if verify else "size")
        names = checkpoint.tensor_names(section)
        if names:
            return Weights({n: checkpoint.read(section, n) for n in names}, "mmtrain checkpoint", str(path))
    for folder in (path, deepspeed_files.tag_folder(path)):
        if folder is not None and deepspeed_files.optimizer_files(folder):
            return Weights(deepspeed_files.read_weights(folder), "DeepSpeed directory, ZeRO", str(folder))
        if folder is not None and (folder / deepspeed_files.MODEL_FILE).exists():
            deepspeed_files.refuse_partitioned_model(folder)
            return _read_file(folder / deepspeed_files.MODEL_FILE, kind="DeepSpeed directory")
    for name in _HF_FILES:
        if (path / name).exists():
            return _read_file(path / name, kind="Hugging Face directory")
    found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
    raise CheckpointError(
        f"{path}: no weights of a known kind in this directory ({found}); expected a checkpoint of mmtrain or "
        "DeepSpeed, model.safetensors, pytorch_model.bin or an index of either"
    )


def _read_file(path: Path, *, kind: str | None = None) -> Weights:
    check_regular(path.stat(), path)
    if path.name.endswith(_INDEX):
        return _read_sharded(path, kind or "sharded weights")
    if path.suffix == ".safetensors":
        return Weights(_read_safetensors(path), kind or "safetensors", str(path))
    contents, ignored = safe_pickle.load(path)
    state, found = _unwrap(contents, path)
    tensors = {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}
    ignored += [f"{name} ({type(value).__name__})" for name, value in state.items() if name not in tensors]
    if not tensors:
        raise CheckpointError(f"{path}: it contains no tensors by name (found {_described(contents)})")
    for name, value in tensors.items():
        problem = _not_dense(value)
        if problem:
            raise CheckpointError(
                f"{path}: {name!r} is a {problem} tensor, expected a dense one; convert it before saving"
            )
    return Weights(tensors, kind or found, str(path), ignored)


def _not_dense(tensor: Tensor) -> str:
    """What keeps the values of a tensor from being copied, "" for nothing."""
    if tensor.is_quantized:
        return "quantized"
    if tensor.is_nested:
        return "nested"
    if tensor.layout != torch.strided:
        return "sparse"
    return "" if tensor.device.type == "cpu" else f"{tensor.device.type}-device"


def _read_sharded(path: Path, kind: str) -> Weights:
    try:
        weight_map = json.loads(read_bounded(path, _INDEX_LIMIT))["weight_map"]
        files = sorted({str(file) for file in weight_map.values()})
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not an index of sharded weights ({reason(error)})") from error
    merged = Weights({}, kind, str(path))
    for file in files:
        if file.endswith(_INDEX):
            raise CheckpointError(f"{path}: it lists {file!r}, which is an index itself, expected files of weights")
        if Path(file).name != file or len(file) > _LONGEST_NAME:
            raise CheckpointError(f"{path}: it lists {file[:_LONGEST_NAME]!r}, which is not a file beside it")
        if not os.path.exists(path.parent / file):  # noqa: PTH110 - unlike Path.exists it takes any name
            raise CheckpointError(f"{path.parent / file}: missing, though {path.name} lists it")
        part = _read_file(path.parent / file)
        merged.tensors |= part.tensors
        merged.ignored += part.ignored
    absent = [name for name in weight_map if name not in merged.tensors]
    if absent:
        raise CheckpointError(f"{path}: {len(absent)} tensors that it lists are not in any file, {absent[0]!r} first")
    return merged


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: it cannot be read as safetensors ({reason(error)})") from error


def _unwrap(contents: Any, path: Path) -> tuple[Mapping[str, Any], str]:
    """The mapping of names to tensors in what ``torch.load`` returned, and what kind of file that is."""
    if not isinstance(contents, Mapping):
        raise CheckpointError(f"{path}: expected a dict of tensors, found {_described(contents)}")
    for key in _WRAPPERS:
        inner = contents.get(key)
        if isinstance(inner, Mapping) and any(isinstance(value, Tensor) for value in inner.values()):
            mmengine = key == "state_dict" and "message_hub" in contents
            return inner, "MMEngine checkpoint" if mmengine else f"checkpoint (its {key!r})"
    return contents, "state dict"


def _described(contents: Any) -> str:
    if isinstance(contents, Mapping):
        return f"a dict with {', '.join(map(repr, list(contents)[:5])) or 'nothing'}"
    return f"a {type(contents).__name__}"
