"""Exports the weights of a checkpoint in formats that other programs read.

One safetensors file, MMEngine's ``.pth`` (``{"state_dict": ..., "meta": ...}``), or a Hugging Face directory. A model
is always built by the caller from the user's config: nothing in a checkpoint is executed.
"""

import hashlib
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmtrain import model_state
from mmtrain.checkpoint.foreign import deepspeed_files
from mmtrain.checkpoint.format.manifest import Manifest
from mmtrain.checkpoint.reader import Checkpoint
from mmtrain.checkpoint.write.plain_files import replacing, write_weights
from mmtrain.errors import CheckpointError, ConfigError

#: What a published model may hold; ``ema_state_dict`` if the run keeps running averages.
PUBLISHED = ("meta", "state_dict", "ema_state_dict")
_HOOKS = "hooks."


def read_weights(checkpoint: Checkpoint, *, average: str | None = None) -> dict[str, Tensor]:
    """The tensors of the section ``model`` on the CPU, by name.

    With ``average`` (a hook's name, see `averages_in`) its running averages replace the weights, in the type of the
    weights, as a validation uses them.
    """
    weights = {name: checkpoint.read("model", name) for name in checkpoint.tensor_names("model")}
    if not weights and deepspeed_files.optimizer_files(checkpoint.path):
        weights = deepspeed_files.read_weights(checkpoint.path)
    if average is not None:
        _put_in_place(averages_in(checkpoint)[average], weights, checkpoint.path)
    return weights


def _put_in_place(averages: Mapping[str, Tensor], weights: dict[str, Tensor], path: Path) -> None:
    for name, value in averages.items():
        if name not in weights or not isinstance(value, Tensor) or weights[name].shape != value.shape:
            raise CheckpointError(f"{path}: there is no weight {name!r} of the same shape as its average")
        weights[name] = value.to(weights[name].dtype)


def averages_in(checkpoint: Checkpoint) -> dict[str, dict[str, Tensor]]:
    """The running averages of weights in the state of hooks: the hook's name, then the weight's."""
    found = {}
    for key, state in checkpoint.state_by_name().items():
        averages = state.get("averages") if isinstance(state, dict) else None
        if key.startswith(_HOOKS) and isinstance(averages, dict) and "steps" in state:
            found[key.removeprefix(_HOOKS)] = averages
    return found


def fill(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    partial: bool = False,
    others: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Give ``model`` the ``weights`` and return its tensors by name; ``others`` are those entries of its state that are
    not plain tensors.

    ``partial`` lets parameters keep what the model was built with (``save_frozen=False`` leaves them out of a
    checkpoint). Raises CheckpointError that names what does not fit.
    """
    own = model_state.targets(model, {name: (value.shape, value.dtype) for name, value in weights.items()})
    named = model.named_parameters(remove_duplicate=False) if partial else ()
    frozen = {name for name, value in named if not value.requires_grad}
    problems = [f"the model does not have {name}" for name in weights if name not in own]
    problems += [f"the checkpoint does not have {name}" for name in own if name not in weights and name not in frozen]
    problems += [
        f"{name} is {list(weights[name].shape)} in the checkpoint and {list(value.shape)} in the model"
        for name, value in own.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"the weights do not fit the model of the config: {'; '.join(problems[:3])}{more}")
    with torch.no_grad():
        for name, value in weights.items():
            own[name].copy_(value)
    model_state.load(model, {**(others or {}), **{name: own[name] for name in weights}})
    return model_state.tensors_of(model)


def cast(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The floating-point tensors in another type; integer and bool tensors stay as they are."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in weights.items()}


def write_safetensors(path: Path, weights: Mapping[str, Tensor]) -> None:
    """One file that ``safetensors.torch.load_file`` reads. Raises CheckpointError if it cannot be written."""
    write_weights(path, weights)


def write_mmengine(path: Path, weights: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """The file that ``mmengine.runner.load_checkpoint`` reads; it holds plain values and tensors only.

    ``torch.load(path, weights_only=True)`` is enough for it. Raises CheckpointError if it cannot be written.
    """
    with replacing(path) as aside:
        _save({"meta": dict(meta), "state_dict": dict(weights)}, aside)


def publish(checkpoint: Checkpoint, keys: Collection[str]) -> Path:
    """MMEngine's published model: ``<checkpoint's stem>-<8 digits of its sha256>.pth`` next to the checkpoint.

    ``keys`` are among `PUBLISHED`. ``state_dict`` holds the running averages if the run has them, and
    ``ema_state_dict`` the weights themselves then, as MMEngine's EMAHook swaps them. Raises CheckpointError if it
    cannot be written.
    """
    weights = read_weights(checkpoint)
    content = {"meta": mmengine_meta(checkpoint.manifest), "state_dict": weights}
    averages = next((found for found in averages_in(checkpoint).values() if found), None)
    if averages is not None:
        content["ema_state_dict"] = dict(weights)
        _put_in_place(averages, weights, checkpoint.path)
    stem = checkpoint.path.with_suffix("")
    nameless = stem.with_name(f".{stem.name}.published")
    with replacing(nameless) as aside:
        _save({key: value for key, value in content.items() if key in keys}, aside)
    digest = hashlib.sha256()
    try:
        with nameless.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
        return nameless.replace(stem.with_name(f"{stem.name}-{digest.hexdigest()[:8]}.pth"))
    except OSError as error:
        raise CheckpointError(f"{stem.name} could not be published: {error}") from error


def mmengine_meta(manifest: Manifest) -> dict[str, Any]:
    """The metadata that MMEngine keeps with the weights, as far as an mmtrain checkpoint has it."""
    return {
        "epoch": manifest.epoch,
        "iter": manifest.iteration,
        "seed": manifest.seed,
        "cfg": manifest.config,
        "experiment_name": manifest.meta.get("experiment_name", ""),
        "time": manifest.meta.get("timestamp", ""),
        "mmtrain_version": manifest.versions.get("mmtrain", ""),
    }


def pretrained_part(model: nn.Module) -> tuple[str, Any]:
    """The outermost module that knows how to write itself as a Hugging Face directory, and its name in the model.

    It is known by its ``save_pretrained`` and ``config``, so transformers need not be imported. Raises ConfigError
    if there is none.
    """
    for name, module in model.named_modules():
        if callable(getattr(module, "save_pretrained", None)) and hasattr(module, "config"):
            return name, module
    raise ConfigError(
        f"{type(model).__name__} is not a Hugging Face model and contains none: no module has save_pretrained and "
        "config; export it as safetensors or mmengine"
    )


def write_huggingface(path: Path, model: nn.Module, *, dtype: torch.dtype | None = None) -> list[str]:
    """Write the Hugging Face model in ``model``, whose weights are in place, as a directory for ``from_pretrained``.

    A ``tokenizer`` or ``processor`` of the model that can do so is written with it. Returns the names of the tensors
    outside that part, which the directory has no place for. Raises CheckpointError if it cannot be written.
    """
    name, part = pretrained_part(model)
    inside = f"{name}." if name else ""
    left_out = [key for key in model.state_dict() if not key.startswith(inside)]
    if dtype is not None:
        part.to(dtype)
    with replacing(path) as aside:
        part.save_pretrained(str(aside))
        for companion in ("tokenizer", "processor"):
            save = getattr(getattr(model, companion, None), "save_pretrained", None)
            if callable(save):
                save(str(aside))
    return left_out


def _save(content: Mapping[str, Any], path: Path) -> None:
    with path.open("wb") as file:  # torch.save keeps the name of a path in the file, so equal contents would differ
        torch.save(content, file)


def write_pretrained(path: Path, model: Any, weights: Mapping[str, Tensor]) -> None:
    """The directory that ``from_pretrained`` reads for a Hugging Face ``model`` with these weights, in one file.

    ``model.safetensors`` in it is a plain one. Raises CheckpointError if it cannot be written.
    """
    with replacing(path) as aside:
        for part in ("config", "generation_config"):
            settings = getattr(model, part, None)
            if settings is not None:
                settings.save_pretrained(str(aside))
        write_weights(aside / "model.safetensors", weights)
        if path.is_dir():
            shutil.rmtree(path)
