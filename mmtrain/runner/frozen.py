"""What ``save_frozen=False`` leaves out of checkpoints, and the check at a resume that it is still the same."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from mmtrain import dist
from mmtrain.dtensor import full_tensor
from mmtrain.errors import CheckpointError
from mmtrain.strategies import Strategy


def frozen_names(model: nn.Module) -> frozenset[str]:
    """The parameters that do not train, under all of their names."""
    named = model.named_parameters(remove_duplicate=False)
    return frozenset(name for name, parameter in named if not parameter.requires_grad)


class FrozenParameters:
    """The parameters that have not trained since the run was built.

    One that trained for a while and was frozen later is not among them: its values do not come from the build.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self._model = model or nn.Module()
        self._names = frozen_names(self._model)
        self._hashed: tuple[frozenset[str], dict[str, Any]] = (frozenset(), {})

    def names(self) -> frozenset[str]:
        """Their names now."""
        self._names &= frozen_names(self._model)
        return self._names

    def remove(self, names: Collection[str]) -> None:
        """Leave out those that a checkpoint holds: they have trained."""
        self._names -= set(names)

    def fingerprint(self, strategy: Strategy) -> dict[str, Any]:
        """`tensors_fingerprint` of them; computed once, because they do not change. A collective."""
        names = self.names()
        if self._hashed[0] != names:
            self._hashed = (names, tensors_fingerprint(strategy.model_state() if names else {}, names))
        return self._hashed[1]

    def check(self, saved: Mapping[str, Any], strategy: Strategy, *, where: str) -> None:
        """Compare with ``saved``, a checkpoint's fingerprint; raises as `check_same_frozen`. A collective."""
        if saved:
            check_same_frozen(saved, self.fingerprint(strategy), where=where, count=len(self.names()))


def check_same_frozen(saved: Mapping[str, Any], today: Mapping[str, Any], *, where: str, count: int) -> None:
    """Raise CheckpointError if two fingerprints are of different values.

    Values of different dtypes (another precision of the engine) cannot be compared and are accepted.
    """
    if saved and today and saved["types"] == today["types"] and saved["hash"] != today["hash"]:
        raise CheckpointError(
            f"{where} was saved without its frozen parameters (save_frozen=False or exclude_frozen_parameters=True), "
            f"and the {count} frozen parameters of this model are different from the ones it was trained with. Build "
            "the model with the same pretrained weights, or, if they came from load_from, give them again: "
            "resume='auto', load_from=..."
        )


def tensors_fingerprint(tensors: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Any]:
    """``{"types": sorted dtypes, "hash": xxh3-128 of names, shapes and values}``; {} without names. A collective."""
    hasher = xxhash.xxh3_128()
    types = set()
    for name in sorted(tensors.keys() & set(names)):
        value = full_tensor(tensors[name])
        if dist.is_main():
            types.add(str(value.dtype))
            hasher.update(f"{name} {tuple(value.shape)}".encode())
            values: Any = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            hasher.update(values)
    return dist.broadcast_object({"types": sorted(types), "hash": hasher.hexdigest()} if names else {})
