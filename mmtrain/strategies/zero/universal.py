"""Tensors by name from the files of another world, stage or strategy, through DeepSpeed's universal format.

DeepSpeed's own converter (`deepspeed.checkpoint.ds_to_universal`) takes the shards apart into one folder for each
parameter. That folder is made in the work dir, never inside the checkpoint, and is removed afterwards.
"""

import argparse
import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from mmtrain import dist, heartbeat
from mmtrain.checkpoint.foreign import deepspeed_files
from mmtrain.checkpoint.foreign.matching import copy_matched
from mmtrain.errors import CheckpointError
from mmtrain.strategies.base import SavedTensor
from mmtrain.strategies.zero import library

PREFIX = ".universal-"
_SLOTS = ("exp_avg", "exp_avg_sq")
_Entry = tuple[SavedTensor, Callable[[], Tensor]]


def remove_leftovers(root: Path) -> None:
    """Have rank 0 remove the folders of killed runs; for a run that holds the lock of ``root``."""
    for path in root.glob(f"{PREFIX}*") if dist.is_main() else ():
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def opened(checkpoint: Path, native: Mapping[str, Any], *, room: Path) -> Iterator["Universal"]:
    """The tensors of a checkpoint that DeepSpeed wrote; a collective.

    Rank 0 converts into a folder of ``room``, which all ranks must see; it is removed at the end, also after an error.
    Raises CheckpointError on every rank if the files cannot be converted.
    """
    library.load()
    mark = xxhash.xxh3_64_hexdigest((checkpoint / "manifest.json").read_bytes())
    folder = room / f"{PREFIX}{checkpoint.name}-{mark}"
    try:
        dist.on_main(lambda: _convert(checkpoint, folder, native))
        with library.plain_files(str(checkpoint)):
            source = Universal(checkpoint, folder, native)
        yield source
        dist.barrier()
    finally:
        if dist.is_main():
            shutil.rmtree(folder, ignore_errors=True)


def _convert(checkpoint: Path, folder: Path, native: Mapping[str, Any]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with library.plain_files(str(checkpoint)), library.quiet():
        _refuse_what_would_be_lost(checkpoint, native)
        from deepspeed.checkpoint import ds_to_universal

        save = ds_to_universal._save_checkpoint
        try:
            folder.mkdir(parents=True)
            ds_to_universal._save_checkpoint = _beating(save)
            ds_to_universal.main(
                argparse.Namespace(
                    input_folder=str(checkpoint), output_folder=str(folder / "converted"), num_extract_workers=1,
                    num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=False,
                )
            )  # fmt: skip
        except OSError as error:
            raise CheckpointError(
                f"{checkpoint} was saved by {native['world']} processes in ZeRO stage {native['stage']} and cannot be "
                f"converted in {folder.parent}: {error.strerror or error}; make room there, or resume with the same "
                "processes and stage"
            ) from error
        finally:
            ds_to_universal._save_checkpoint = save


def _beating(save: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, which also reports progress to the watchdog each time it is called."""

    def reporting(*args: Any) -> Any:
        heartbeat.beat()
        return save(*args)

    return reporting


def _refuse_what_would_be_lost(checkpoint: Path, native: Mapping[str, Any]) -> None:
    """The converter knows Adam's moments and would drop, or miss, any others; it mistakes parameters in one order."""
    if native.get("round_robin"):
        raise CheckpointError(
            f"{checkpoint} was saved with zero_optimization.round_robin_gradients, for which DeepSpeed's universal "
            "format gives parameters the values of others; resume with the same processes and ZeRO stage, or begin "
            "from the weights (resume=False, load_from=...)"
        )
    path = deepspeed_files.optimizer_files(checkpoint)[0]
    state = torch.load(path, map_location="cpu", mmap=True)["optimizer_state_dict"]
    state = state["base_optimizer_state"] if int(native["stage"]) < 3 else state["optimizer_state_dict"]
    found = {slot for slots in state["state"].values() for slot in slots}
    if found - {"step", *_SLOTS} or not found.issuperset(_SLOTS):
        raise CheckpointError(
            f"{checkpoint}: its optimizer keeps {', '.join(sorted(found)) or 'nothing'}, and DeepSpeed's universal "
            "format takes Adam's exp_avg and exp_avg_sq alone; resume with the same processes and ZeRO stage, or begin "
            "from the weights (resume=False, load_from=...)"
        )


class Universal:
    """Model and optimizer tensors by name, read when asked for; sections as in a `Checkpoint`."""

    def __init__(self, checkpoint: Path, folder: Path, native: Mapping[str, Any]) -> None:
        self.path = checkpoint
        self._zero = folder / "converted" / "zero"
        self._stage = int(native["stage"])
        files = deepspeed_files.model_files(checkpoint)
        self._models = [torch.load(path, map_location="cpu", mmap=True) for path in files]
        self._shapes = deepspeed_files.parameter_shapes(self._models[0])
        self._readers: dict[str, dict[str, _Entry]] = {
            "model": self._model(), "optimizer": self._optimizer(),
        }  # fmt: skip

    def saved(self, section: str) -> dict[str, SavedTensor]:
        """Shape and type of each tensor of a section."""
        return {name: saved for name, (saved, _) in self._readers[section].items()}

    def tensor_names(self, section: str) -> list[str]:
        """The names in a section."""
        return list(self._readers[section])

    def read(self, section: str, name: str) -> Tensor:
        """One full tensor."""
        with library.plain_files(str(self.path)):
            return self._readers[section][name][1]()

    def load(self, section: str, into: Mapping[str, Tensor]) -> None:
        """Copy tensors into those of ``into``, which may be sharded. Raises CheckpointError unless all names fit."""
        own = self._readers[section]
        missing, unexpected = [n for n in into if n not in own], [n for n in own if n not in into]
        if missing or unexpected:
            raise CheckpointError(
                f"{self.path}: its {section} does not fit this run; missing {missing[:5]}, not in this run "
                f"{unexpected[:5]}"
            )
        for name, target in into.items():
            heartbeat.beat()
            copy_matched({name: self.read(section, name)}, {name: target}, source=str(self.path))

    def _model(self) -> dict[str, _Entry]:
        """Masters of what trains; frozen parameters and buffers as they were saved; tied names as their tensor."""
        names = deepspeed_files.resolve_names(self._models, self._shapes, partitioned=self._stage == 3)
        return {
            name: self._from_folder(found, "fp32", self._shapes[found]) if isinstance(found, str) else _held(found)
            for name, found in names.items()
        }

    def _optimizer(self) -> dict[str, _Entry]:
        found: dict[str, _Entry] = {}
        for name, shape in self._shapes.items():
            for slot in _SLOTS:
                if (self._zero / name / f"{slot}.pt").exists():
                    found[f"{name}/{slot}"] = self._from_folder(name, slot, shape)
            step = self._step(name)
            if step is not None:
                found[f"{name}/step"] = _held(step)
        return found

    def _from_folder(self, name: str, slot: str, shape: torch.Size) -> _Entry:
        path = self._zero / name / f"{slot}.pt"

        def read() -> Tensor:
            value = torch.load(path, map_location="cpu", mmap=True)
            return (value["param"] if isinstance(value, Mapping) else value).reshape(shape)

        return SavedTensor(tuple(shape), torch.float32), read

    def _step(self, name: str) -> Tensor | None:
        """The step count: beside the parameter, or in stage 3 once for all."""
        path = self._zero / name / "step.pt"
        if path.exists():
            step = torch.load(path, map_location="cpu")
        else:
            state = torch.load(self._zero / "optimizer_state.pt", map_location="cpu", mmap=True)
            step = next((slots.get("step") for slots in state["optimizer_state_dict"]["state"].values()), None)
        if step is None or isinstance(step, Tensor):
            return step
        return torch.tensor(float(step), dtype=torch.float64)


def _held(value: Tensor) -> _Entry:
    return SavedTensor(tuple(value.shape), value.dtype), lambda: value
