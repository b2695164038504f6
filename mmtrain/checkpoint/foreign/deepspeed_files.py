"""DeepSpeed's checkpoint files: their names, their layout, and reading them without DeepSpeed.

The float32 masters of trained parameters are divided over the ranks' ``*_optim_states.pt``, in the order of
``param_shapes``; frozen parameters and buffers are in ``*_model_states.pt`` (see DeepSpeed's ``zero_to_fp32.py``).
No code in the files is run.
"""

import itertools
import math
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtrain.checkpoint.foreign import safe_pickle
from mmtrain.errors import CheckpointError
from mmtrain.files import read_bounded
from mmtrain.printable import reason

MODEL_FILE = "mp_rank_00_model_states.pt"
_TAG_LIMIT = 4096  # bytes of the file ``latest``
_VALUES_LIMIT = 1_000_000  # values of one file that a comparison takes; shared parts of a pickle can be any number
_SUFFIX = "_states.pt"
_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_(?:optim|model)_states\.pt$")


def is_state_file(path: str) -> bool:
    """Whether this is the name of one of DeepSpeed's files."""
    return path.endswith(_SUFFIX)


def optimizer_files(folder: Path) -> list[Path]:
    """The files with the shards of the optimizer, in the order of ranks; [] where ZeRO left none."""
    return _by_rank(folder.glob("*zero_pp_rank_*_mp_rank_00_optim_states.pt"))


def model_files(folder: Path) -> list[Path]:
    """The files with the model, in the order of ranks: one, or with ZeRO stage 3 one for each rank."""
    return _by_rank(folder.glob("zero_pp_rank_*_mp_rank_00_model_states.pt")) or [folder / MODEL_FILE]


def tag_folder(folder: Path) -> Path | None:
    """The folder that ``latest`` in ``folder`` names, if it is one in it."""
    try:
        tag = read_bounded(folder / "latest", _TAG_LIMIT).decode("utf-8", "replace").strip()
    except OSError:
        return None
    return folder / tag if tag not in ("", "..") and "\0" not in tag and Path(tag).name == tag else None


def refuse_partitioned_model(folder: Path) -> None:
    """Raise CheckpointError if a model without ZeRO's optimizer files is divided over several files."""
    files = {
        path.name for pattern in ("mp_rank_*", "zero_pp_rank_*") for path in folder.glob(f"{pattern}_model_states.pt")
    }
    others = sorted(files - {MODEL_FILE})
    if others:
        raise CheckpointError(
            f"{folder}: its weights are divided over files ({others[0]}, ...); join them first with DeepSpeed's "
            "zero_to_fp32.py and load the result"
        )


def parameter_shapes(model: Mapping[str, Any]) -> dict[str, torch.Size]:
    """The full shapes of the trained parameters by name, from the contents of a model file."""
    return {name: shape for group in model["param_shapes"] for name, shape in group.items()}


def resolve_names(
    models: Sequence[Mapping[str, Any]], masters: Container[str], *, partitioned: bool
) -> dict[str, str | Tensor]:
    """For each name in the model: the parameter in ``masters`` that has its value, or the tensor as it was saved.

    ``models`` are the contents of the model files. Tied names resolve to one parameter. With ``partitioned``, frozen
    parameters are divided over the files.
    """
    first = models[0]
    tied = first.get("shared_params") or {}
    frozen = first.get("frozen_param_shapes") or {}
    found: dict[str, str | Tensor] = {}
    for name, value in first["module"].items():
        origin = tied.get(name, name)
        if origin in masters:
            found[name] = origin
        elif partitioned and origin in frozen:
            shards = torch.cat([model["frozen_param_fragments"][origin].reshape(-1) for model in models])
            found[name] = shards[: math.prod(frozen[origin])].reshape(frozen[origin])
        elif isinstance(value, Tensor):
            found[name] = value
    return found


def _by_rank(paths: Iterator[Path]) -> list[Path]:
    found = {int(match[1]): path for path in paths if (match := _RANK.search(path.name))}
    return [found[rank] for rank in sorted(found)]


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of the model by name: float32 masters, and what has none as it was saved.

    Raises CheckpointError if the file of a rank is missing or the files do not belong together.
    """
    optims = [safe_pickle.load(path)[0]["optimizer_state_dict"] for path in optimizer_files(folder)]
    models = [safe_pickle.load(path)[0] for path in model_files(folder)]
    world = models[0].get("dp_world_size", len(optims))
    if len(optims) != world or len(models) not in (1, world):
        raise CheckpointError(f"{folder}: it was written by {world} ranks, but has files of {len(optims)}")
    try:
        masters = _stage_3(optims, models[0]) if "fp32_flat_groups" in optims[0] else _stages_1_2(optims, models[0])
        names = resolve_names(models, masters, partitioned=len(models) > 1)
        return {name: masters[found] if isinstance(found, str) else found for name, found in names.items()}
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: its files do not fit together ({reason(error)})") from error


def _stages_1_2(optims: Sequence[Mapping[str, Any]], model: Mapping[str, Any]) -> dict[str, Tensor]:
    """Each group of parameters is one flat tensor, divided evenly over the ranks; it may have gaps."""
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
    """Each parameter is divided evenly over the ranks, the last shard padded."""
    flats = [torch.cat([*optim["fp32_flat_groups"]]) for optim in optims]
    found = {}
    start = 0
    for shapes in model["param_shapes"]:
        for name, shape in shapes.items():
            size = math.prod(shape)
            length = math.ceil(size / len(flats))
            found[name] = torch.cat([flat.narrow(0, start, length) for flat in flats])[:size].reshape(shape)
            start += length
    return found


def contents(folder: Path) -> Iterator[tuple[str, Any]]:
    """The name and the contents of each of DeepSpeed's files; objects of its classes are replaced by class names.

    Raises CheckpointError where a file cannot be read, or holds itself.
    """
    for path in sorted([*folder.glob("*_optim_states.pt"), *folder.glob("*_model_states.pt")]):
        values = itertools.count(1)
        try:
            yield path.name, _plain(safe_pickle.load(path)[0], values)
        except (OverflowError, RecursionError) as error:
            raise CheckpointError(f"{path}: it has too many values, or holds itself") from error


def _plain(value: Any, values: Iterator[int]) -> Any:
    if next(values) > _VALUES_LIMIT:
        raise OverflowError
    if isinstance(value, Mapping):
        return {key: _plain(item, values) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, values) for item in value]
    return type(value).__name__ if isinstance(value, safe_pickle.Inert) else value
