"""What a checkpoint's manifest says about the run besides its files."""

from collections.abc import Mapping
from typing import Any

import torch

from mmtrain import dist, model_state
from mmtrain.errors import CheckpointError
from mmtrain.runner.compare import flat_config
from mmtrain.runner.run import Run
from mmtrain.version import __version__


def manifest_fields(run: Run) -> dict[str, Any]:
    """The fields of `mmtrain.checkpoint.Manifest` that describe a run; docs/checkpoint_format.md lists them."""
    import numpy

    stream = run.train_dataloader
    assert stream is not None
    assert run.optim_wrapper is not None
    return {
        "position": run.progress.state_dict(),
        "world_size": run.world_size,
        "strategy": type(run.strategy).__name__,
        "seed": run.seed,
        "config": run.directory.config_text,
        "data_fingerprint": run.data_fingerprint,
        "versions": {"mmtrain": __version__, "torch": torch.__version__, "numpy": numpy.__version__},
        "meta": {
            "batch_size": stream.batch_size,
            "data_size": dist.data_size(),
            "accumulative_counts": run.optim_wrapper.accumulative_counts,
            "samples_per_epoch": stream.samples,
            "iterations_per_epoch": stream.iterations_per_epoch,
            "max_iters": run.max_iters,
            "max_epochs": run.max_epochs,
            "optimizer": run.optimizer_name,
            "experiment_name": run.experiment_name,
            "timestamp": run.timestamp,
            "config_values": flat_config(run.cfg),
            **_buffers(run),
        },
    }


def _buffers(run: Run) -> dict[str, Any]:
    """The buffers whose shape or type is not the one that the model was built with, where there are any."""
    changed = model_state.changed_kinds(run.buffer_kinds, model_state.buffer_kinds(run.model))
    described = {
        name: None if kind is None else {"shape": [*kind[0]], "dtype": str(kind[1]).removeprefix("torch.")}
        for name, kind in changed.items()
    }
    return {"buffers": described} if described else {}


def saved_kinds(described: Mapping[str, Any]) -> dict[str, model_state.Kind]:
    """What the manifest's ``meta.buffers`` says, for `mmtrain.model_state.reshape_buffers`. Raises CheckpointError."""
    kinds: dict[str, model_state.Kind] = {}
    for name, kind in described.items():
        dtype = getattr(torch, str(kind["dtype"]), None) if kind is not None else None
        if kind is not None and not isinstance(dtype, torch.dtype):
            raise CheckpointError(f"the checkpoint's buffer {name} has the type {kind['dtype']!r}, which torch lacks")
        kinds[name] = None if dtype is None else (tuple(kind["shape"]), dtype)
    return kinds
