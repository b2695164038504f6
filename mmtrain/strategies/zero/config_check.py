"""DeepSpeed's config against the run's: values in both must be equal; the run decides what DeepSpeed leaves open.

The mathematics of a run are in ``optim_wrapper`` and ``train_dataloader``, as on every strategy. DeepSpeed's config may
repeat them, or say "auto"; if it says something else, the run is refused with both places named.
"""

from collections.abc import Mapping
from typing import Any

import torch

from mmtrain.errors import ConfigError
from mmtrain.optim import AmpOptimWrapper, OptimWrapper
from mmtrain.registry import OPTIM_WRAPPERS, resolve
from mmtrain.source_lines import where as position
from mmtrain.strategies.zero.options import Options

_HALF = {"bf16": "bfloat16", "fp16": "float16"}


def settled(options: Options, cfg: Any, *, world: int, device: torch.device) -> dict[str, Any]:
    """The config for ``deepspeed.initialize``, every "auto" filled in from the run's config.

    Raises ConfigError if the two contradict each other.
    """
    optim = _said(cfg.get("optim_wrapper"))
    values = {key: value for key, value in options.values.items() if not (value == "auto" or key in _HALF)}
    counts = optim.get("accumulative_counts", 1)
    batch = (cfg.get("train_dataloader") or {}).get("batch_size")
    _same(options, "gradient_accumulation_steps", counts, "optim_wrapper.accumulative_counts")
    if batch is not None:
        _same(options, "train_micro_batch_size_per_gpu", batch, "train_dataloader.batch_size")
        _same(
            options, "train_batch_size", batch * world * counts,
            f"train_dataloader.batch_size x {world} processes x optim_wrapper.accumulative_counts",
        )  # fmt: skip
    values |= {"gradient_accumulation_steps": counts, "train_micro_batch_size_per_gpu": batch or 1}
    values.pop("train_batch_size", None)
    values["gradient_clipping"] = _clipping(options, optim)
    values.update(_precision(options, optim, device))
    return values


def _said(optim: Any) -> Mapping[str, Any]:
    """``optim_wrapper`` as its arguments, even if the config holds a wrapper that is already built."""
    if not isinstance(optim, OptimWrapper):
        return optim if isinstance(optim, Mapping) else {}
    said: dict[str, Any] = {"type": type(optim), "accumulative_counts": optim.accumulative_counts}
    return said | {"clip_grad": optim.clip_grad, "dtype": getattr(optim, "dtype", None)}


def _same(options: Options, key: str, own: Any, place: str) -> None:
    said = options.get(key)
    if said not in (None, "auto", own):
        path = place if " " not in place else ""
        raise ConfigError(
            f"{options.where(key)} is {said!r} and `{place}`{position(path) if path else ''} is {own!r}: make them "
            f'equal, or write {key!r}: "auto"'
        )


def _clipping(options: Options, optim: Mapping[str, Any]) -> float:
    """The largest norm, 0 for none: DeepSpeed clips, because only it sees the norm over all shards."""
    clip, place = optim.get("clip_grad") or {}, "optim_wrapper.clip_grad"
    if clip.get("type", "norm") != "norm" or float(clip.get("norm_type", 2)) != 2.0:
        raise ConfigError(
            f"`{place}`{position(place)} is {dict(clip)!r}, and DeepSpeed only clips by the 2-norm; write "
            "clip_grad=dict(max_norm=...), or use another strategy"
        )
    if clip.get("error_if_nonfinite"):
        raise ConfigError(
            f"`{place}.error_if_nonfinite`{position(place)} is set: DeepSpeed skips such a step and cannot stop "
            "for it; leave it out"
        )
    largest = float(clip.get("max_norm", 0))
    said = options.get("gradient_clipping")
    if said not in (None, "auto") and float(said) != largest:
        raise ConfigError(
            f"{options.where('gradient_clipping')} is {said!r} and `{place}`{position(place)} is "
            f"{dict(clip) if clip else None!r}: make them equal (clip_grad=dict(max_norm={said})), or write "
            "'gradient_clipping': \"auto\""
        )
    return largest


def _precision(options: Options, optim: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The sections ``bf16`` and ``fp16``, with ``enabled`` decided."""
    wanted = _amp_dtype(optim, device)
    place = "optim_wrapper.type" if optim.get("dtype") is None else "optim_wrapper.dtype"
    found: dict[str, Any] = {}
    for key, dtype in _HALF.items():
        section = dict(options.get(key) or {})
        said = section.get("enabled", False)
        enabled = (wanted == dtype) if said == "auto" else bool(said)
        if wanted is not None and enabled != (wanted == dtype):
            state = "not enabled" if not enabled else "enabled"
            raise ConfigError(
                f"`{place}`{position(place)} asks for {wanted} and {options.where(key)} is {state}: write "
                f"{ {name: {'enabled': wanted == kind} for name, kind in _HALF.items()} } in DeepSpeed's config, or "
                "type='OptimWrapper'"
            )
        if section:
            found[key] = {**section, "enabled": enabled}
    chosen = [key for key in found if found[key]["enabled"]]
    if len(chosen) > 1:
        raise ConfigError(f"{options.where('bf16')} and {options.where('fp16')} are both enabled: keep one")
    if "fp16" in chosen:
        _loss_scale(options, optim, found["fp16"])
    return found


def _amp_dtype(optim: Mapping[str, Any], device: torch.device) -> str | None:
    kind = resolve(OPTIM_WRAPPERS, optim.get("type", OptimWrapper), path="optim_wrapper.type")
    if not (isinstance(kind, type) and issubclass(kind, AmpOptimWrapper)):
        return None
    dtype = optim.get("dtype")
    return str(torch.get_autocast_dtype(device.type) if dtype is None else dtype).removeprefix("torch.")


def _loss_scale(options: Options, optim: Mapping[str, Any], fp16: dict[str, Any]) -> None:
    scale, said = optim.get("loss_scale", "dynamic"), fp16.get("loss_scale")
    own = 0 if scale == "dynamic" else scale
    if isinstance(own, Mapping):
        raise ConfigError(
            "optim_wrapper.loss_scale is a dict of torch's scaler, and DeepSpeed has its own; write its arguments in "
            f"{options.where('fp16')} (initial_scale_power, loss_scale_window, ...) and loss_scale='dynamic'"
        )
    if "loss_scale" not in optim:
        return
    if said is not None and float(said) != float(own):
        raise ConfigError(
            f"{options.where('fp16.loss_scale')} is {said!r} and optim_wrapper.loss_scale is {scale!r}: make them equal"
        )
    fp16["loss_scale"] = own
