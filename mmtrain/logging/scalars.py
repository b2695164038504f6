"""Scalars of a run: kept where they were made, read once per log line."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from mmtrain import dist
from mmtrain.errors import RunError

# Values of one name are packed, without a wait for the device, every PACK; what nobody read is summed on the host
# every FOLD packs, so that a run without a reader keeps a bounded amount of memory.
PACK = 1024
FOLD = 64

Pack = list[float | Tensor]  # numbers, and one 1-d tensor per device and dtype


class Scalars:
    """Collects named numbers every iteration and gives their means when asked.

    A tensor stays on its device until `read` or `state_dict` (or until 65,536 values of its name have piled up). Means
    are those of the values in float64, exactly rounded: they do not depend on when the pile was packed, saved or
    restored, so an interval that a restart cuts in two has the mean that it would have had. Names in ``maxima`` give
    their maximum instead of their mean, over the interval and over ranks.
    """

    def __init__(self, maxima: Iterable[str] = ("memory",)) -> None:
        self._maxima = frozenset(maxima)
        self._pending: defaultdict[str, list[Any]] = defaultdict(list)
        self._packs: defaultdict[str, list[Pack]] = defaultdict(list)
        self._folded: dict[str, tuple[float, int]] = {}
        self._latest: dict[str, float] = {}

    def record(self, name: str, value: Any) -> None:
        """Note a value: a number, or a detached tensor of one element. A wrong value is told by the next `read`."""
        values = self._pending[name]
        values.append(value)
        if len(values) >= PACK:
            self._pack(name)

    def record_all(self, values: Mapping[str, Any]) -> None:
        """Note several values by name."""
        for name, value in values.items():
            self.record(name, value)

    def read(self, reduce: bool = True) -> dict[str, float]:
        """Return the mean of each name since the last read, and clear.

        All tensors of a device come over in one transfer. With ``reduce`` the means are averaged over ranks, which
        makes this a collective call; a name that some ranks lack is averaged over those that have it. Raises RunError
        that names the scalar for a value that is no single number.
        """
        values = self._take()
        folded, self._folded = self._folded, {}
        own = {name: self._combine(name, values.get(name, []), folded.get(name)) for name in {**folded, **values}}
        if reduce and dist.world_size() > 1:
            # One exchange carries names and values, so ranks need not agree on the names beforehand.
            own = self._over_ranks(dist.gather_objects(own))
        self._latest.update(own)
        return own

    def latest(self, name: str) -> float | None:
        """What the last `read` that had this name gave for it; None before. Never touches a device."""
        return self._latest.get(name)

    def state_dict(self) -> dict[str, Any]:
        """What was recorded since the last read, of every rank; a collective call with one transfer per device."""
        values = self._take()
        self._put_back(values)
        folded = {name: list(pair) for name, pair in self._folded.items()}
        return {"ranks": dist.gather_objects({"values": values, "folded": folded})}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up the records of a saved run; at another number of ranks everyone takes those of all ranks."""
        ranks = state_dict["ranks"]
        self._take()
        self._folded = {}
        values: defaultdict[str, list[float]] = defaultdict(list)
        for state in [ranks[dist.rank()]] if len(ranks) == dist.world_size() else ranks:
            for name, (total, count) in state["folded"].items():
                self._fold(name, total, count)
            for name, found in state["values"].items():
                values[name] += found
        self._put_back(values)

    def _pack(self, name: str) -> None:
        self._packs[name].append(_packed(name, self._pending.pop(name)))
        if len(self._packs[name]) >= FOLD:
            values = _on_host({name: self._packs.pop(name)})[name]
            self._fold(name, self._total(name, values), len(values))

    def _fold(self, name: str, total: float, count: int) -> None:
        known = self._folded.get(name)
        if known is not None:
            total, count = self._total(name, [known[0], total]), known[1] + count
        self._folded[name] = (total, count)

    def _take(self) -> dict[str, list[float]]:
        """Everything that is not folded, as numbers; nothing is left."""
        pending, packs = self._pending, self._packs
        self._pending, self._packs = defaultdict(list), defaultdict(list)
        for name, records in pending.items():
            packs[name].append(_packed(name, records))
        return _on_host(packs)

    def _put_back(self, values: Mapping[str, list[float]]) -> None:
        # Whole packs first: packing and folding then fall due where they would have without the restart.
        for name, found in values.items():
            whole = len(found) // PACK * PACK
            if whole:
                self._packs[name] = [list(found[start : start + PACK]) for start in range(0, whole, PACK)]
            self._pending[name] = list(found[whole:])

    def _total(self, name: str, values: list[float]) -> float:
        return max(values) if name in self._maxima else _sum(values)

    def _combine(self, name: str, values: list[float], folded: tuple[float, int] | None) -> float:
        count = len(values)
        if folded is not None:
            values, count = [folded[0], *values], count + folded[1]
        total = self._total(name, values)
        return total if name in self._maxima else total / count

    def _over_ranks(self, rows: list[dict[str, float]]) -> dict[str, float]:
        values: defaultdict[str, list[float]] = defaultdict(list)
        for row in rows:
            for name, value in row.items():
                values[name].append(value)
        return {name: self._combine(name, found, None) for name, found in values.items()}


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


def _sum(values: list[float]) -> float:
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):  # beyond the largest float, or inf - inf
        return sum(values)
