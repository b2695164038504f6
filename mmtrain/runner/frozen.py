"""What ``save_frozen=False`` leaves out of checkpoints, and the proof at a resume that it is still the same."""

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


class Frozen:
    """The parameters that have not trained since the run was built.

    One that trained for a while and was frozen then is not among them: its values do not come from the build.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self._model = model or nn.Module()
        self._names = frozen_names(self._model)
        self._known: tuple[frozenset[str], dict[str, Any]] = (frozenset(), {})

    def names(self) -> frozenset[str]:
        """Their names now."""
        self._names &= frozen_names(self._model)
        return self._names

    def remove(self, names: Collection[str]) -> None:
        """Leave out those that a checkpoint holds: they have trained."""
        self._names -= set(names)

    def fingerprint(self, strategy: Strategy) -> dict[str, Any]:
        """Their types, and a hash of their names and values; computed once, for they do not change. A collective."""
        names = self.names()
        if self._known[0] != names:
            self._known = (names, fingerprint(strategy.model_state() if names else {}, names))
        return self._known[1]

    def check(self, saved: Mapping[str, Any], strategy: Strategy, *, where: str) -> None:
        """Compare with ``saved``, a checkpoint's fingerprint; raises as `refuse_other`. A collective."""
        if saved:
            refuse_other(saved, self.fingerprint(strategy), where=where, count=len(self.names()))


def refuse_other(saved: Mapping[str, Any], own: Mapping[str, Any], *, where: str, count: int) -> None:
    """Raise CheckpointError where two fingerprints are those of other values.

    Values of another type (another precision of the engine) cannot be compared, and pass.
    """
    if saved and own and saved["types"] == own["types"] and saved["hash"] != own["hash"]:
        raise CheckpointError(
            f"{where} was saved without the frozen parameters (save_frozen=False or exclude_frozen_parameters=True), "
            f"and the {count} of this model are not those that it was trained with; build the model with the same "
            "pretrained weights, or, where they came by load_from, give them again with resume='auto', load_from=..."
        )


def fingerprint(tensors: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Any]:
    """The types of these tensors, and a hash of their names and values. A collective."""
    hasher, types = xxhash.xxh3_128(), set()
    for name in sorted(tensors.keys() & set(names)):
        value = full_tensor(tensors[name])
        if dist.is_main():
            types.add(str(value.dtype))
            hasher.update(f"{name} {tuple(value.shape)}".encode())
            values: Any = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            hasher.update(values)
    return dist.broadcast_object({"types": sorted(types), "hash": hasher.hexdigest()} if names else {})
