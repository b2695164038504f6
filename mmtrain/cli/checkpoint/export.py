"""``checkpoint export``: the weights of a checkpoint for other programs."""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmtrain import model_state
from mmtrain.checkpoint import Checkpoint, copy_matched, load_weights
from mmtrain.checkpoint.foreign import export as forms
from mmtrain.cli.checkpoint.find import find_checkpoint
from mmtrain.cli.checkpoint.text import counted, echo, warn
from mmtrain.errors import ConfigError
from mmtrain.runner.checkpoint_fields import saved_kinds
from mmtrain.runner.frozen import check_same_frozen, frozen_names, tensors_fingerprint
from mmtrain.runner.state import saved_model_entries


def export(arguments: argparse.Namespace) -> int:
    """Write one file or directory, after checking every file of the checkpoint against its hash."""
    out = Path(arguments.out).expanduser()
    form = arguments.format or ("mmengine" if out.suffix == ".pth" else "safetensors")
    _check_out(out, form, force=arguments.force)
    if form == "huggingface" and arguments.config is None:
        raise ConfigError(
            "--format huggingface needs --config CONFIG to build the model; the config stored in a checkpoint is "
            "never executed"
        )
    checkpoint = find_checkpoint(arguments.checkpoint, verify="full")
    weights = forms.read_weights(checkpoint, average=_average(checkpoint, arguments.ema))
    model = None if arguments.config is None else _model(arguments, checkpoint)
    partial = not checkpoint.manifest.meta.get("has_frozen", True)
    if model is not None:
        model_state.reshape_buffers(model, saved_kinds(checkpoint.manifest.meta.get("buffers", {})))
        others = saved_model_entries(checkpoint.state())
        weights = forms.fill(model, weights, partial=partial, others=others)
        if partial:
            _check_frozen(model, checkpoint)
    elif partial:
        _warn(
            "the checkpoint was saved without frozen parameters, so the exported file does not have them; pass "
            "--config to add them"
        )
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    if form == "huggingface":
        assert model is not None
        left_out = forms.write_huggingface(out, model, dtype=dtype)
        if left_out:
            _warn(
                f"left out {counted(len(left_out), 'tensor')} outside the Hugging Face model: {', '.join(left_out[:3])}"
            )
    else:
        weights = weights if dtype is None else forms.cast(weights, dtype)
        if form == "mmengine":
            forms.write_mmengine(out, weights, forms.mmengine_meta(checkpoint.manifest))
        else:
            forms.write_safetensors(out, weights)
    echo(f"wrote {out} ({form}, {counted(len(weights), 'tensor')} from {checkpoint.path})")
    return 0


def _check_out(out: Path, form: str, *, force: bool) -> None:
    if not out.exists():
        return
    directory = form == "huggingface"
    if out.is_dir() != directory or (directory and any(out.iterdir())):
        raise ConfigError(f"{out} exists and is {'a directory' if out.is_dir() else 'a file'}; choose another name")
    if not directory and not force:
        raise ConfigError(f"{out} exists; choose another name, or overwrite it with --force")


def _average(checkpoint: Checkpoint, wanted: str | None) -> str | None:
    """The hook whose weight averages to export: the one that ``--ema`` names, or the only one there is."""
    if wanted is None:
        return None
    found = forms.averages_in(checkpoint)
    names = ", ".join(found)
    if not found:
        raise ConfigError(f"--ema: {checkpoint.path} has no weight averages")
    if wanted and wanted not in found:
        raise ConfigError(f"--ema {wanted}: {checkpoint.path} has no weight averages of that hook, only of {names}")
    if not wanted and len(found) > 1:
        raise ConfigError(f"--ema: several hooks in {checkpoint.path} have weight averages; name one of {names}")
    name = wanted or next(iter(found))
    if not found[name]:
        raise ConfigError(f"--ema {name}: the hook had not averaged any weights when {checkpoint.path} was saved")
    return name


def _model(arguments: argparse.Namespace, checkpoint: Checkpoint) -> nn.Module:
    """The model of the user's config, built like in a run with the checkpoint's seed."""
    from mmtrain.config import check_config, load_config, parse_overrides, positions
    from mmtrain.runner.build_model import build_model

    cfg: Any = load_config(arguments.config, parse_overrides(arguments.cfg_options))
    with positions(cfg):
        check_config(cfg)
        model = build_model(cfg, seed=checkpoint.manifest.seed or 0)
    if not checkpoint.manifest.meta.get("has_frozen", True) and cfg.get("load_from") is not None:
        copy_matched(load_weights(str(cfg["load_from"])).tensors, model.state_dict(), source=str(cfg["load_from"]))
    return model


def _check_frozen(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if the frozen parameters of the model are not those of the checkpointed run."""
    names = frozen_names(model)
    built = tensors_fingerprint(dict(model.state_dict()), names)
    check_same_frozen(checkpoint.manifest.meta.get("frozen") or {}, built, where=str(checkpoint.path), count=len(names))


def _warn(text: str) -> None:
    warn(f"warning: {text}")
