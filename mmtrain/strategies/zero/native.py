"""DeepSpeed's checkpoint files: written inside mmtrain's transaction, read as plain data."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash

from mmtrain import dist
from mmtrain.errors import CheckpointError
from mmtrain.optim import OptimWrapper
from mmtrain.strategies.base import Native
from mmtrain.strategies.zero import library

FORMAT = "deepspeed"


def describe(engine: Any, dtype: torch.dtype) -> dict[str, Any]:
    """What must be equal for the files to be read as they are: ranks, stage, type, and how parameters were divided."""
    return {
        "format": FORMAT,
        "version": library.load().__version__,
        "world": dist.world_size(),
        "stage": int(engine.zero_optimization_stage()),
        "dtype": str(dtype).removeprefix("torch."),
        "round_robin": bool(engine._config.zero_config.round_robin_gradients),
        "layout": _layout(engine),
    }


def _layout(engine: Any) -> str:
    """A hash of the groups of parameters, in DeepSpeed's order, and of the options that move their elements."""
    own = engine.optimizer
    groups = next(getattr(own, name) for name in ("fp16_groups", "bit16_groups", "bf16_groups") if hasattr(own, name))
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    order = [[(names[id(p)], list(getattr(p, "ds_shape", p.shape))) for p in group] for group in groups]
    zero = engine._config.zero_config
    options = [zero.parameter_alignment, zero.elastic_checkpoint, type(own).__name__]
    return xxhash.xxh3_64_hexdigest(json.dumps([order, options]).encode())


def fits(description: Mapping[str, Any], engine: Any, dtype: torch.dtype) -> bool:
    """Whether this engine can read files of that description as they are."""
    own = describe(engine, dtype)
    return all(description.get(key) == own[key] for key in own if key != "version")


def writer(engine: Any, *, exclude_frozen: bool, dtype: torch.dtype) -> Native:
    """Return the function that writes the engine's files into a directory, on every rank and without a collective."""
    from deepspeed.checkpoint import (
        UNIVERSAL_CHECKPOINT_INFO,
        UNIVERSAL_CHECKPOINT_VERSION_KEY,
        UNIVERSAL_CHECKPOINT_VERSION_VALUE,
    )

    universal = {UNIVERSAL_CHECKPOINT_INFO: {UNIVERSAL_CHECKPOINT_VERSION_KEY: UNIVERSAL_CHECKPOINT_VERSION_VALUE}}
    engine._copy_recovery_script = lambda _: None  # it copies scripts next to the checkpoint
    prologue = getattr(engine.optimizer, "checkpoint_event_prologue", None)
    epilogue = getattr(engine.optimizer, "checkpoint_event_epilogue", None)

    def write(directory: Path) -> None:
        # Not `save_checkpoint`: its barriers would leave the others waiting for a rank whose disk is full.
        place = {"save_dir": str(directory.parent), "tag": directory.name}
        if prologue is not None:
            prologue()
        try:
            engine._save_checkpoint(**place, client_state=universal, exclude_frozen_parameters=exclude_frozen)
            engine._save_zero_checkpoint(place["save_dir"], place["tag"])
        finally:
            if epilogue is not None:
                epilogue()  # a collective, which a rank that failed takes part in

    return Native({**describe(engine, dtype), "frozen": not exclude_frozen}, write)


def load(engine: Any, optim: OptimWrapper, directory: Path, description: Mapping[str, Any]) -> None:
    """Read the engine's files. Hyperparameters stay today's.

    Raises CheckpointError for a file that is not plain data, or does not fit.
    """
    optimizer, own = optim.optimizer, engine.optimizer
    groups = list(optimizer.param_groups)
    scaler, clip = getattr(own, "loss_scaler", None), getattr(own, "clip_grad", None)
    with library.plain_files(str(directory)), library.quiet():
        path, _ = engine.load_checkpoint(
            str(directory.parent), tag=directory.name, load_lr_scheduler_states=False,
            load_module_strict=bool(description.get("frozen", True)),
        )  # fmt: skip
    if path is None:
        raise CheckpointError(f"{directory}: DeepSpeed found nothing to load there")
    # The very dicts that the schedules write into, with the parameters that the engine steps.
    for group, loaded in zip(groups, optimizer.param_groups, strict=True):
        group["params"] = loaded["params"]
    optimizer.param_groups[:] = groups
    if clip is not None:
        own.clip_grad = clip
    if scaler is not None and not getattr(scaler, "dynamic", False):
        own.loss_scaler = scaler
    if hasattr(own, "_hp_optimizer_states_linked"):
        own._hp_optimizer_states_linked = False
