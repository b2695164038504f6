"""``checkpoint export``: the weights of a checkpoint for other programs."""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmtrain.checkpoint import Checkpoint, copy_matched, load_weights
from mmtrain.checkpoint.foreign import export as forms
from mmtrain.cli.checkpoint.find import find_checkpoint
from mmtrain.cli.checkpoint.text import counted
from mmtrain.errors import ConfigError
from mmtrain.runner.frozen import check_same_frozen, frozen_names, tensors_fingerprint


def export(arguments: argparse.Namespace) -> int:
    """Write one file or directory. Every file of the checkpoint is compared with its hash before."""
    out = Path(arguments.out).expanduser()
    form = arguments.format or ("mmengine" if out.suffix == ".pth" else "safetensors")
    _check_out(out, form, force=arguments.force)
    if form == "huggingface" and arguments.config is None:
        raise ConfigError(
            "huggingface needs --config CONFIG to know the model: the config in a checkpoint is text and is never run"
        )
    checkpoint = find_checkpoint(arguments.checkpoint, verify="full")
    weights = forms.read_weights(checkpoint, average=_average(checkpoint, arguments.ema))
    model = None if arguments.config is None else _model(arguments, checkpoint)
    partial = not checkpoint.manifest.meta.get("has_frozen", True)
    if model is not None:
        weights = forms.fill(model, weights, partial=partial)
        if partial:
            _check_frozen(model, checkpoint)
    elif partial:
        _warn("the checkpoint has no frozen parameters (they were not saved), so the file has none; give --config")
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    if form == "huggingface":
        assert model is not None
        left_out = forms.write_huggingface(out, model, dtype=dtype)
        if left_out:
            _warn(
                f"{counted(len(left_out), 'tensor')} outside the Hugging Face model left out: {', '.join(left_out[:3])}"
            )
    else:
        weights = weights if dtype is None else forms.cast(weights, dtype)
        if form == "mmengine":
            forms.write_mmengine(out, weights, forms.mmengine_meta(checkpoint.manifest))
        else:
            forms.write_safetensors(out, weights)
    print(f"wrote {out} ({form}, {counted(len(weights), 'tensor')} of {checkpoint.path})")
    return 0


def _check_out(out: Path, form: str, *, force: bool) -> None:
    if not out.exists():
        return
    directory = form == "huggingface"
    if out.is_dir() != directory or (directory and any(out.iterdir())):
        raise ConfigError(f"{out} exists and is {'a directory' if out.is_dir() else 'a file'}; choose another name")
    if not directory and not force:
        raise ConfigError(f"{out} exists; choose another name, or replace it with --force")


def _average(checkpoint: Checkpoint, wanted: str | None) -> str | None:
    """The hook whose averages are asked for; the only one there is where no name was given."""
    if wanted is None:
        return None
    found = forms.averages_in(checkpoint)
    names = ", ".join(found) or "none"
    if not found or (wanted and wanted not in found) or (not wanted and len(found) > 1):
        asked = f"--ema {wanted}".strip()
        raise ConfigError(f"{asked}: hooks with averages of weights in {checkpoint.path}: {names}")
    name = wanted or next(iter(found))
    if not found[name]:
        raise ConfigError(f"--ema {name}: it had averaged nothing yet when {checkpoint.path} was saved")
    return name


def _model(arguments: argparse.Namespace, checkpoint: Checkpoint) -> nn.Module:
    """The model of the user's config, built as a run with the checkpoint's seed builds it."""
    from mmtrain.config import check_config, load_config, parse_overrides, positions
    from mmtrain.randomness import STREAM_BUILD, mix, seed_generators
    from mmtrain.registry import MODELS, build

    cfg: Any = load_config(arguments.config, parse_overrides(arguments.cfg_options))
    with positions(cfg):
        check_config(cfg)
        if cfg.get("model") is None:
            raise ConfigError(f"{arguments.config} has no 'model'; expected model=dict(type=..., ...)")
        seed_generators(mix(STREAM_BUILD, checkpoint.manifest.seed or 0))
        model = build(MODELS, cfg["model"], path="model")
    init_weights = getattr(model, "init_weights", None)
    if callable(init_weights):
        init_weights()
    if not checkpoint.manifest.meta.get("has_frozen", True) and cfg.get("load_from") is not None:
        copy_matched(load_weights(str(cfg["load_from"])).tensors, model.state_dict(), source=str(cfg["load_from"]))
    return model


def _check_frozen(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError where what the checkpoint lacks is not what it was trained with."""
    names = frozen_names(model)
    own = tensors_fingerprint(dict(model.state_dict()), names)
    check_same_frozen(checkpoint.manifest.meta.get("frozen") or {}, own, where=str(checkpoint.path), count=len(names))


def _warn(text: str) -> None:
    sys.stderr.write(f"warning: {text}\n")
