"""Which parameters train and which modules are in evaluation mode, as far as training has changed it."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from mmtrain.printable import listed

_TEXT = {
    ("requires_grad", True): "Unfrozen",
    ("requires_grad", False): "Frozen",
    ("training", True): "Set to training mode",
    ("training", False): "Set to evaluation mode",
}


class ModelSwitches:
    """``requires_grad`` of the model's parameters and ``training`` of its modules.

    Up to the end of ``before_train`` both come from today's model, config and hooks. What hooks change after it, such
    as a backbone that begins to train at epoch 3, is state: it is saved by name and set again after ``before_train`` of
    a resumed run.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._start: dict[str, dict[str, bool]] | None = None
        self._saved: dict[str, dict[str, bool]] = {}

    def begin_training(self) -> list[str]:
        """Note how training starts, then set what `load_state_dict` gave; returns lines about what that changed."""
        self._start = self._now()
        owners: dict[str, dict[str, Any]] = {
            "requires_grad": dict(self._model.named_parameters()), "training": dict(self._model.named_modules())
        }  # fmt: skip
        changed: dict[tuple[str, bool], list[str]] = {}
        for kind, flags in self._saved.items():
            for name, value in flags.items():
                if self._start[kind].get(name, value) != value:
                    setattr(owners[kind][name], kind, value)
                    changed.setdefault((kind, value), []).append(name)
        return [f"{_TEXT[what]}, as at the checkpoint: {listed(names)}." for what, names in changed.items()]

    def state_dict(self) -> dict[str, dict[str, bool]]:
        """The switches by name that are not as they were when training started; {} if all are."""
        if self._start is None:
            return {}
        now, start = self._now(), self._start
        changed = {
            kind: {name: value for name, value in flags.items() if start[kind].get(name, value) != value}
            for kind, flags in now.items()
        }
        return {kind: flags for kind, flags in changed.items() if flags}

    def load_state_dict(self, state_dict: Mapping[str, Mapping[str, bool]]) -> None:
        """Take what `state_dict` gave, for `begin_training`."""
        self._saved = {kind: {name: bool(value) for name, value in flags.items()} for kind, flags in state_dict.items()}

    def _now(self) -> dict[str, dict[str, bool]]:
        return {
            "requires_grad": {name: parameter.requires_grad for name, parameter in self._model.named_parameters()},
            "training": {name: module.training for name, module in self._model.named_modules()},
        }
