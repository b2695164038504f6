"""Scalars of a run: kept on their devices, read once per log line."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from mmtrain import dist
from mmtrain.errors import RunError

# Values of one name are packed every PACK, without waiting for the device, and handed to the readers every FOLD packs.
# A reader adds up PACK * FOLD unread values of a name to one total, so an interval of any length has bounded memory.
PACK = 1024
FOLD = 64

Pack = list[float | Tensor]  # numbers, and one 1-d tensor per device and dtype


class Scalars:
    """Collects named numbers every iteration and gives each reader their means over its own interval.

    A tensor stays on its device until a reader reads or `state_dict` is called (or until 65,536 values of its name have
    piled up). Means are those of the values in float64, exactly rounded: they do not depend on when the values were
    packed, saved or restored, so an interval that a restart interrupts has the same mean. Names in
    ``maxima`` give their maximum instead of their mean, over the interval and over ranks.
    """

    def __init__(self, maxima: Iterable[str] = ("memory",)) -> None:
        self._maxima = frozenset(maxima)
        self._pending: defaultdict[str, list[Any]] = defaultdict(list)
        self._packs: defaultdict[str, list[Pack]] = defaultdict(list)
        self._intervals: dict[str, _Interval] = {}
        self._restored: list[Mapping[str, Any]] = []
        self._latest: dict[str, float] = {}

    def record(self, name: str, value: Any) -> None:
        """Record a value: a number, or a detached tensor of one element. The next read reports a wrong value."""
        values = self._pending[name]
        values.append(value)
        if len(values) >= PACK:
            self._pack(name)

    def reader(self, name: str) -> "ScalarReader":
        """Return the reader ``name``, which is made at the first call and saved under this name.

        It sees what is recorded from now on, after what `load_state_dict` restored for it; the first reader of all also
        sees what was recorded before.
        """
        if name not in self._intervals:
            if self._intervals:
                self._distribute()
            self._intervals[name] = self._restored_interval(name)
        return ScalarReader(self, name)

    def latest(self, name: str) -> float | None:
        """What the last read that included this name returned for it; None before. Never touches a device."""
        return self._latest.get(name)

    def state_dict(self) -> dict[str, Any]:
        """What each reader has not read yet, on every rank; a collective call with one transfer per device."""
        self._distribute()
        readers = {name: interval.state_dict() for name, interval in self._intervals.items()}
        return {"ranks": dist.gather_objects({"readers": readers})}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what a saved run had not read yet; at another number of ranks everyone takes that of all ranks.

        A state without readers, as earlier versions wrote it, is given to every reader.
        """
        ranks = state_dict["ranks"]
        self._restored = [ranks[dist.rank()]] if len(ranks) == dist.world_size() else list(ranks)
        for rank in self._restored:  # also those of readers that are yet to come: an error belongs here
            for saved in rank["readers"].values() if "readers" in rank else [rank]:
                _Interval(self._maxima).add_state(saved)
        self._pending.clear()
        self._packs.clear()
        self._intervals = {name: self._restored_interval(name) for name in self._intervals}

    def _restored_interval(self, name: str) -> "_Interval":
        interval = _Interval(self._maxima)
        for rank in self._restored:
            saved = rank["readers"].get(name) if "readers" in rank else rank
            if saved is not None:
                interval.add_state(saved)
        return interval

    def _pack(self, name: str) -> None:
        self._packs[name].append(_packed(name, self._pending.pop(name)))
        if len(self._packs[name]) >= FOLD:
            packs = {name: self._packs.pop(name)}
            if self._intervals:
                self._hand_out(_on_host(packs))

    def _distribute(self) -> None:
        """Hand everything recorded so far to the readers, with one transfer per device."""
        pending, packs = self._pending, self._packs
        self._pending, self._packs = defaultdict(list), defaultdict(list)
        for name, records in pending.items():
            packs[name].append(_packed(name, records))
        self._hand_out(_on_host(packs))

    def _hand_out(self, values: Mapping[str, list[float]]) -> None:
        for interval in self._intervals.values():
            interval.extend(values)

    def _read(self, reader: str) -> dict[str, float]:
        self._distribute()
        means = self._intervals[reader].means()
        self._intervals[reader] = _Interval(self._maxima)
        if dist.world_size() > 1:
            # One exchange carries names and values, so ranks need not agree on the names beforehand.
            values: defaultdict[str, list[float]] = defaultdict(list)
            for row in dist.gather_objects(means):
                for name, value in row.items():
                    values[name].append(value)
            means = {name: _mean(name, found, len(found), self._maxima) for name, found in values.items()}
        self._latest.update(means)
        return means


class ScalarReader:
    """Reads the scalars of a run at its own interval; other readers do not affect it. See `Scalars.reader`."""

    def __init__(self, scalars: Scalars, name: str) -> None:
        self._scalars = scalars
        self._name = name

    def read(self) -> dict[str, float]:
        """Return the mean of each name since this reader's last read, averaged over ranks.

        A collective call, with one exchange; a name that some ranks lack is averaged over those that have it. All
        tensors of a device are copied to the host in one transfer. Raises RunError that names the scalar for a value
        that is not a single number.
        """
        return self._scalars._read(self._name)


class _Interval:
    """The values that one reader has not read: by name, those kept and the total and count of those folded."""

    def __init__(self, maxima: frozenset[str]) -> None:
        self._maxima = maxima
        self._values: defaultdict[str, list[float]] = defaultdict(list)
        self._folded: dict[str, tuple[float, int]] = {}

    def extend(self, values: Mapping[str, Sequence[float]]) -> None:
        # Folds fall due by what this reader has seen alone, whenever it is handed out: a restart changes no sum.
        limit = PACK * FOLD
        for name, found in values.items():
            kept = self._values[name]
            kept += found
            while len(kept) >= limit:
                self._fold(name, _total(name, kept[:limit], self._maxima), limit)
                del kept[:limit]

    def means(self) -> dict[str, float]:
        return {name: self._mean(name) for name in {**self._folded, **self._values}}

    def _mean(self, name: str) -> float:
        values = self._values.get(name, [])
        count = len(values)
        if name in self._folded:
            total, folded = self._folded[name]
            values, count = [total, *values], count + folded
        return _mean(name, values, count, self._maxima)

    def state_dict(self) -> dict[str, Any]:
        values = {name: list(found) for name, found in self._values.items()}
        return {"values": values, "folded": {name: list(pair) for name, pair in self._folded.items()}}

    def add_state(self, state: Mapping[str, Any]) -> None:
        for name, (total, count) in state["folded"].items():
            self._fold(name, _number(name, total), max(int(count), 1))
        self.extend(
            {name: [_number(name, value) for value in found] for name, found in state["values"].items() if found}
        )

    def _fold(self, name: str, total: float, count: int) -> None:
        known = self._folded.get(name)
        if known is not None:
            total, count = _total(name, [known[0], total], self._maxima), known[1] + count
        self._folded[name] = (total, count)


def _number(name: str, value: Any) -> float:
    if not isinstance(value, int | float):
        raise TypeError(f"a value of the scalar {name!r} is a {type(value).__name__}, not a number")
    return value


def _total(name: str, values: list[float], maxima: frozenset[str]) -> float:
    if name in maxima:
        return max(values)
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):  # beyond the largest float, or inf - inf
        return sum(values)


def _mean(name: str, values: list[float], count: int, maxima: frozenset[str]) -> float:
    total = _total(name, values, maxima)
    return total if name in maxima else total / count


def _packed(name: str, records: list[Any]) -> Pack:
    """Check the values of one name and stack its tensors, reading none."""
    pack: Pack = []
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for value in records:
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise RunError(f"the scalar {name!r} is a tensor of shape {tuple(value.shape)}; expected one element")
            groups.setdefault((value.device, value.dtype), []).append(value if value.dim() == 0 else value.reshape(()))
        elif isinstance(value, Real):
            pack.append(float(value))
        else:
            raise RunError(f"the scalar {name!r} is a {type(value).__name__}; expected a number or a 0-d tensor")
    with torch.no_grad():
        pack += [torch.stack(tensors) for tensors in groups.values()]
    return pack


def _on_host(packs: Mapping[str, list[Pack]]) -> dict[str, list[float]]:
    """The numbers of every name, with one transfer per device."""
    values: dict[str, list[float]] = {}
    by_device: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, several in packs.items():
        values[name] = [item for pack in several for item in pack if not isinstance(item, Tensor)]
        for item in (item for pack in several for item in pack):
            if isinstance(item, Tensor):
                by_device.setdefault(item.device, []).append((name, item))
    for device, group in by_device.items():
        stacks = [stack for _, stack in group]
        if len({stack.dtype for stack in stacks}) > 1:
            stacks = [stack.to(torch.float32 if device.type == "mps" else torch.float64) for stack in stacks]
        host = torch.cat(stacks).tolist()
        start = 0
        for name, stack in group:
            values[name] += [float(value) for value in host[start : start + len(stack)]]
            start += len(stack)
    return values
