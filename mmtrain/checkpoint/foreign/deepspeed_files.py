"""The files that DeepSpeed leaves in a directory, read without DeepSpeed: whole weights, and everything to compare.

The masters of trained parameters lie cut in the ranks' ``*_optim_states.pt``, in the order of ``param_shapes``; frozen
parameters and buffers lie in ``*_model_states.pt`` (see DeepSpeed's ``zero_to_fp32.py``). Nothing in the files is run.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtrain.checkpoint.foreign import safe_pickle
from mmtrain.errors import CheckpointError

_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_(?:optim|model)_states\.pt$")


def shards(folder: Path) -> list[Path]:
    """The files with the parts of the optimizer, in the order of ranks; [] where ZeRO left none."""
    return _ordered(folder.glob("*zero_pp_rank_*_mp_rank_00_optim_states.pt"))


def _ordered(paths: Iterator[Path]) -> list[Path]:
    found = {int(match[1]): path for path in paths if (match := _RANK.search(path.name))}
    return [found[rank] for rank in sorted(found)]


def read_whole(folder: Path) -> dict[str, Tensor]:
    """All weights of the model by name: float32 masters, and what has none as it was saved.

    Raises CheckpointError where a rank's file is missing or they do not belong together.
    """
    optims = [safe_pickle.load(path)[0]["optimizer_state_dict"] for path in shards(folder)]
    partitioned = _ordered(folder.glob("zero_pp_rank_*_mp_rank_00_model_states.pt"))
    models = [safe_pickle.load(path)[0] for path in partitioned or [folder / "mp_rank_00_model_states.pt"]]
    world = models[0].get("dp_world_size", len(optims))
    if len(optims) != world or len(models) not in (1, world):
        raise CheckpointError(f"{folder}: it was written by {world} ranks, and files of {len(optims)} are there")
    try:
        masters = _stage_3(optims, models[0]) if "fp32_flat_groups" in optims[0] else _stages_1_2(optims, models[0])
        return _named(models, masters)
    except (KeyError, IndexError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: its files do not fit one another ({error!r})") from error


def _stages_1_2(optims: Sequence[Mapping[str, Any]], model: Mapping[str, Any]) -> dict[str, Tensor]:
    """Each group of parameters is one flat tensor, cut into as many parts as there are ranks; it may have gaps."""
    found = {}
    gaps = optims[0].get("param_alignment_paddings") or [[0] * len(shapes) for shapes in model["param_shapes"]]
    for index, shapes in enumerate(model["param_shapes"]):
        flat = torch.cat([optim["single_partition_of_fp32_groups"][index] for optim in optims])
        start = 0
        for (name, shape), gap in zip(shapes.items(), gaps[index], strict=True):
            size = math.prod(shape)
            found[name] = flat.narrow(0, start, size).reshape(shape)
            start += size + gap
    return found


def _stage_3(optims: Sequence[Mapping[str, Any]], model: Mapping[str, Any]) -> dict[str, Tensor]:
    """Each parameter is cut into as many equal parts as there are ranks, the last one padded."""
    flats = [torch.cat([*optim["fp32_flat_groups"]]) for optim in optims]
    found, start = {}, 0
    for shapes in model["param_shapes"]:
        for name, shape in shapes.items():
            size = math.prod(shape)
            part = math.ceil(size / len(flats))
            found[name] = torch.cat([flat.narrow(0, start, part) for flat in flats])[:size].reshape(shape)
            start += part
    return found


def _named(models: Sequence[Mapping[str, Any]], masters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    first = models[0]
    tied, frozen = first.get("shared_params") or {}, first.get("frozen_param_shapes") or {}
    found = {}
    for name, value in first["module"].items():
        origin = tied.get(name, name)
        if origin in masters:
            found[name] = masters[origin]
        elif len(models) > 1 and origin in frozen:
            parts = torch.cat([model["frozen_param_fragments"][origin].reshape(-1) for model in models])
            found[name] = parts[: math.prod(frozen[origin])].reshape(frozen[origin])
        elif isinstance(value, Tensor):
            found[name] = value
    return found


def contents(folder: Path) -> Iterator[tuple[str, Any]]:
    """Each of DeepSpeed's files with what it holds; objects of its classes as the names of these."""
    for path in sorted([*folder.glob("*_optim_states.pt"), *folder.glob("*_model_states.pt")]):
        yield path.name, _plain(safe_pickle.load(path)[0])


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return type(value).__name__ if isinstance(value, safe_pickle.Inert) else value
