"""Marks of the values that an object keeps, to find out later which of them have changed.

Looked at are numbers, texts, tensors, arrays, random generators and containers of these, also inside objects of the
user's classes. Not looked at, because they are no state of a run: modules, optimizers, functions, files, libraries'
objects, containers of more than 1000 items and large tensors (data), tensors with a ``grad_fn`` (results
of the step), and attributes whose names contain "cache" or end with "memo".
"""

import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from mmtrain.dtensor import local_tensor

Marks = dict[str, Any]
"""Name to mark: values with equal marks are equal."""

Clocks = tuple[float, ...]

LARGEST_OF_DATA = 1 << 20
"""For data sets, whose larger tensors are their data."""

_SKIP = object()
_ITEMS, _BYTES, _DEPTH, _NESTED, _TEXT = 1000, 1 << 30, 6, 2, 1000
_OPEN = ("torch.utils.data", "mmengine.dataset")  # libraries whose objects contain the user's
_CLOSED = {*sys.stdlib_module_names, "torch", "numpy", "mmengine", "mmtrain", "pandas", "pyarrow", "datasets"}
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


class Walk:
    """Collects the marks of one object after the other; each object that several share is visited once.

    ``largest`` is the size in bytes of the largest tensor or array to look at.
    """

    def __init__(self, largest: int = 64 << 20) -> None:
        self._largest = largest
        self._left = _BYTES
        self.marks: Marks = {}
        self.generators: set[str] = set()
        self._seen: set[int] = set()

    def attributes(self, owner: Any, path: str, *, ignored: frozenset[str] = frozenset()) -> None:
        """Mark what an object's attributes hold."""
        self._seen.add(id(owner))
        for name, value in list(vars(owner).items()):
            if name not in ignored and not _is_cache(name):
                self.value(value, f"{path}.{name}" if path else name, 1)

    def value(self, value: Any, path: str, depth: int = 0) -> None:
        """Mark one value, and what it contains, by names that begin with ``path``."""
        if depth > _DEPTH or (isinstance(value, Tensor | np.ndarray) and not self._has_room(value)):
            return
        try:
            mark = _mark(value)
        except Exception:  # an object of the user's that cannot be read must not end the run
            return
        if mark is not _SKIP:
            self.marks[path] = mark
            if isinstance(value, _GENERATORS):
                self.generators.add(path)
        elif isinstance(value, dict | list | tuple | deque):
            if len(value) <= _ITEMS and self._is_new(value):
                items = value.items() if isinstance(value, dict) else enumerate(value)
                for key, item in list(items):
                    self.value(item, f"{path}[{_short(key)}]", depth + 1)
        elif _is_users(value) and self._is_new(value):
            for name, item in list(vars(value).items()):
                if not _is_cache(name):
                    self.value(item, f"{path}.{name}", depth + 1)

    def _has_room(self, value: Any) -> bool:
        size = value.nbytes if isinstance(value, np.ndarray) else value.numel() * value.element_size()
        if size > min(self._largest, self._left):
            return False
        self._left -= size
        return True

    def _is_new(self, value: Any) -> bool:
        if id(value) in self._seen:
            return False
        self._seen.add(id(value))
        return True


def _is_clock(mark: Any, since: Clocks) -> bool:
    return type(mark) is float and any(begun <= mark <= now for begun, now in zip(since, clocks(), strict=True))


def clocks() -> Clocks:
    """What the clocks show that programs take times from."""
    return time.time(), time.perf_counter(), time.monotonic()


def _short(key: Any) -> str:
    return repr(key) if isinstance(key, str | int) else type(key).__name__


def _is_cache(name: str) -> bool:
    return "cache" in name or name.endswith("memo")


def _is_users(value: Any) -> bool:
    """Whether an object is of a class whose attributes may be state of the user's."""
    kind = type(value)
    if isinstance(value, nn.Module | torch.optim.Optimizer | type) or not hasattr(value, "__dict__"):
        return False
    module = str(kind.__module__)
    return module.startswith(_OPEN) or module.partition(".")[0] not in _CLOSED


def _mark(value: Any, depth: int = 0) -> Any:
    """The mark of a plain value, or of a small container of plain values; `_SKIP` for another."""
    if value is None or isinstance(value, bool | int | float | complex):
        return value
    if isinstance(value, dict | list | tuple | deque | set | frozenset):
        return _of_items(value, depth)
    for kinds, function in _LEAVES:
        if isinstance(value, kinds):
            return function(value)
    return _SKIP


def _of_items(value: Any, depth: int) -> Any:
    if len(value) > _ITEMS or depth > _NESTED:
        return _SKIP
    items = sorted(value, key=repr) if isinstance(value, set | frozenset) else list(value)
    marks = [_mark(item, depth + 1) for item in (value.values() if isinstance(value, dict) else items)]
    if any(mark is _SKIP for mark in marks):
        return _SKIP
    keys = [repr(key) for key in items] if isinstance(value, dict) else None
    return ("items", len(marks), keys, marks)


def _of_text(value: str | bytes) -> Any:
    return value if len(value) <= _TEXT else _SKIP


def _of_tensor(value: Tensor) -> Any:
    if isinstance(value, nn.Parameter) or value.grad_fn is not None or value.is_meta:
        return _SKIP
    value = local_tensor(value).detach()
    if value.layout is not torch.strided or value.is_quantized:
        return _SKIP
    plain = value.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return ("tensor", tuple(value.shape), str(value.dtype), _hash(plain.view(torch.uint8).numpy()))


def _of_array(value: Any) -> Any:
    if isinstance(value, np.memmap) or value.dtype.hasobject:
        return _SKIP
    return ("array", value.shape, str(value.dtype), _hash(value.tobytes()))


def _of_generator(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return ("generator", _hash(value.get_state().numpy()))
    if isinstance(value, np.random.Generator):
        return ("generator", repr(value.bit_generator.state))
    state = value.getstate() if isinstance(value, random.Random) else value.get_state()
    return ("generator", _hash(repr(state if isinstance(value, random.Random) else _listed(state)).encode()))


def _listed(state: Any) -> list[Any]:
    return [part.tolist() if isinstance(part, np.ndarray) else part for part in state]


_LEAVES: list[tuple[Any, Callable[[Any], Any]]] = [
    ((str, bytes), _of_text), (Tensor, _of_tensor), ((np.ndarray, np.generic), _of_array),
    (_GENERATORS, _of_generator),
]  # fmt: skip


def _hash(data: Any) -> str:
    return xxhash.xxh3_64_hexdigest(data)


def changed(before: Marks, after: Marks) -> Iterator[str]:
    """The names whose marks differ, or that only one of the two has."""
    for name in dict.fromkeys([*before, *after]):
        if not _equal(before.get(name, _SKIP), after.get(name, _SKIP)):
            yield name


def changed_state(start: Marks, first: Marks, now: Marks, since: Clocks) -> list[str]:
    """The names that changed between ``start`` and ``now`` and are neither a cache nor a reading of a clock.

    What was None, or not there, at the start, and since the ``first`` step has not changed, counts as a cache.
    """
    since_first = set(changed(first, now))
    names = []
    for name in changed(start, now):
        is_cache = start.get(name) is None and name not in since_first
        if not is_cache and not _is_clock(now.get(name), since):
            names.append(name)
    return names


def _equal(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and (a == b or repr(a) == repr(b)))  # a NaN is not equal to itself
