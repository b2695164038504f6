"""What parameter groups hold over a resume: ``lr``, ``betas``, and the counters that some optimizers keep there.

The rule for each value of a group:

* a schedule sets it: the schedule's value, as always;
* the config (or the code that builds the optimizer) gives another value today than it gave the run that saved: today's;
* otherwise the saved value, which is what the optimizer or a hook made of it;
* the group did not have it when it was built (``group["k"]`` of an optimizer's own): the saved value.

A group is found again by the names of its parameters. One that a hook added while the saved run was training
(``optimizer.add_param_group``) is added again.
"""

import copy
from collections.abc import Mapping, Sequence
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mmtrain.optim.schedules.schedule_set import ScheduleSet
from mmtrain.optim.wrappers import OptimWrapper
from mmtrain.printable import listed

Group = dict[str, Any]
_NOT_VALUES = ("params", "param_names")
_PLAIN = (type(None), bool, int, float, str, bytes, set, frozenset)


class GroupValues:
    """The values of the groups of every optimizer of a run.

    To be made when everything that decides them at the start is built: optimizers, ``auto_scale_lr`` and schedules.
    """

    def __init__(self, model: nn.Module, optim: OptimWrapper, schedules: ScheduleSet | None = None) -> None:
        self._optimizers = optim.optimizers
        self._parameters = dict(model.named_parameters())
        self._names = {id(parameter): name for name, parameter in reversed(self._parameters.items())}
        self._scheduled = {
            key: schedules.scheduled_keys(one) if schedules is not None else frozenset()
            for key, one in self._optimizers.items()
        }
        self._built = {
            key: [(self._members(group), _values(group)) for group in one.param_groups]
            for key, one in self._optimizers.items()
        }
        self._added: set[frozenset[str]] = set()  # groups that `add_missing` added
        self._at_start: set[frozenset[str]] | None = None  # the other groups when training began

    def begin_training(self) -> None:
        """From now on a new group counts as one that was added during training."""
        groups = [group for one in self._optimizers.values() for group in one.param_groups]
        self._at_start = {frozenset(self._members(group) or ()) for group in groups} - self._added

    def _was_added(self, group: Group) -> bool:
        return self._at_start is not None and frozenset(self._members(group) or ()) not in self._at_start

    def state_dict(self) -> dict[str, list[dict[str, Any]]]:
        """For each optimizer its groups: ``names`` of the parameters, the ``values`` now and when ``built``.

        ``added`` says that the group was added during training.
        """
        return {key: self._groups(key, one) for key, one in self._optimizers.items()}

    def _groups(self, key: str, optimizer: Optimizer) -> list[dict[str, Any]]:
        found = []
        for index, group in enumerate(optimizer.param_groups):
            built = self._built[key][index][1] if index < len(self._built[key]) else {}
            is_new = index >= len(self._built[key])
            values = {
                name: value
                for name, value in _values(group).items()
                if (is_new or name not in self._scheduled[key]) and (_is_plain(value) or name not in built)
            }
            found.append(
                {
                    "names": self._members(group),
                    "values": values,
                    "built": {name: value for name, value in built.items() if name in values},
                    "added": self._was_added(group),
                }
            )
        return found

    def add_missing(self, saved: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
        """Add the groups that a hook added while the saved run was training; returns lines about them."""
        lines = []
        for key, group in self._missing(saved):
            if group["added"]:
                parameters = [self._parameters[name] for name in group["names"]]
                self._optimizers[key].add_param_group({"params": parameters, **copy.deepcopy(dict(group["values"]))})
                self._added.add(frozenset(group["names"]))
                lines.append(f"optimizer: added the group of {listed(group['names'], 3)}, as a hook did before.")
        return lines

    def has_missing(self, saved: Mapping[str, Sequence[Mapping[str, Any]]]) -> bool:
        """Whether a saved group has parameters of the model that no optimizer trains now."""
        return bool(self._missing(saved))

    def _missing(self, saved: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[tuple[str, Mapping[str, Any]]]:
        groups = [group for optimizer in self._optimizers.values() for group in optimizer.param_groups]
        trained = {self._names.get(id(parameter)) for group in groups for parameter in group["params"]}
        if None in trained:  # an engine has put its own tensors in the place of the parameters
            return []
        return [
            (key, group)
            for key in self._optimizers
            for group in saved.get(key, ())
            if group["names"] and trained.isdisjoint(group["names"]) and self._parameters.keys() >= set(group["names"])
        ]

    def merge(self, saved: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
        """Set the values by the rule above; returns lines about groups that are not the saved ones."""
        lines = []
        for key, optimizer in self._optimizers.items():
            if key not in saved:
                continue
            counterparts = self._counterparts(optimizer, saved[key])
            for index, (group, before) in enumerate(zip(optimizer.param_groups, counterparts, strict=True)):
                built = self._built[key][index][1] if index < len(self._built[key]) else {}
                self._merge_group(group, built, before, key)
                if before is None and len(saved[key]):
                    names = self._members(group) or [f"group {index}"]
                    lines.append(
                        f"optimizer: the checkpoint has no group of exactly {listed(names, 3)}; its values come from "
                        "the config."
                    )
        return lines

    def _counterparts(self, optimizer: Optimizer, saved: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any] | None]:
        by_names = {frozenset(group["names"]): group for group in saved if group["names"]}
        found: list[Mapping[str, Any] | None] = []
        for index, group in enumerate(optimizer.param_groups):
            names = self._members(group)
            if names and by_names:
                found.append(by_names.get(frozenset(names)))
            else:  # an engine has put its own tensors in the place of the parameters
                found.append(saved[index] if len(saved) == len(optimizer.param_groups) else None)
        return found

    def _merge_group(self, group: Group, built: Group, saved: Mapping[str, Any] | None, key: str) -> None:
        values = dict(saved["values"]) if saved is not None else {}
        for name in {**built, **values}:
            if name in self._scheduled[key]:
                continue
            is_changed = name in built and (saved is None or not _equal(built[name], saved["built"].get(name)))
            if is_changed or name not in values:
                _put(group, name, built[name]) if name in built else None
            else:
                if name in built and not _alike(built[name], values[name]):
                    raise ValueError(f"{name} is {values[name]!r} in the checkpoint, and {built[name]!r} now")
                _put(group, name, values[name])

    def _members(self, group: Group) -> list[str] | None:
        """The names of a group's parameters; None if they are not the model's."""
        names = [self._names.get(id(parameter)) for parameter in group["params"]]
        return None if None in names else [name for name in names if name is not None]


def _values(group: Group) -> Group:
    return {name: _copied(value) for name, value in group.items() if name not in _NOT_VALUES}


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return copy.deepcopy(value) if isinstance(value, (list, dict, set, tuple)) else value


def _alike(built: Any, saved: Any) -> bool:
    """Whether a saved value can take the place of the built one: numbers of numbers, a tuple of one as long."""
    if built is None or saved is None:
        return True
    if isinstance(built, bool):
        return isinstance(saved, Number | Tensor) and bool(saved in (0, 1))
    for kind in ((Number, Tensor), str, Mapping, list):
        if isinstance(built, kind) or isinstance(saved, kind):
            return isinstance(built, kind) and isinstance(saved, kind)
    if isinstance(built, tuple) and isinstance(saved, tuple):
        return len(built) == len(saved) and all(map(_alike, built, saved))
    return not isinstance(built, tuple) and not isinstance(saved, tuple)


def _put(group: Group, name: str, value: Any) -> None:
    """Set a value; a tensor is filled, because a compiled or captured step holds on to it."""
    held = group.get(name)
    if isinstance(held, Tensor):
        with torch.no_grad():
            held.copy_(torch.as_tensor(value))
    else:
        group[name] = _copied(value)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one.cpu(), other.cpu())
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other) or (one != one and other != other)  # noqa: PLR0124 (NaN equals NaN here)


def _is_plain(value: Any) -> bool:
    """Whether a value can be in a checkpoint. Others (a dtype, a function) come from the config."""
    if type(value) is dict:
        return all(map(_is_plain, value.values()))
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    return type(value) in _PLAIN or isinstance(value, Tensor)
