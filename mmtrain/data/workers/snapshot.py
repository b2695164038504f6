"""What a dataset and its functions look like now, to find out whether the main process has changed them since."""

import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch

MOST_OBJECTS = 20_000  # about 20 milliseconds
LONG = 1000  # elements of a container, or characters of a text, from which only a few are looked at
SMALL_ARRAY = 4096  # bytes of an array up to which its contents are compared

_PLAIN = (bool, int, float, complex, type(None))


class Snapshot:
    """The attributes of objects and of what they refer to, breadth first; two snapshots can be compared.

    Attributes, elements of containers, closures and arguments of ``partial`` are compared by value. Of containers of
    more than `LONG` elements a few elements and the length are compared, of arrays above `SMALL_ARRAY` bytes the
    identity and shape, of tensors also torch's version counter. So a snapshot takes milliseconds however large the
    dataset is, and sees what hooks do (replace a pipeline, set a flag or an epoch), but not an element that is replaced
    inside a long list or a large array.
    """

    def __init__(self, *roots: Any) -> None:
        self._tokens: list[Any] = []
        self._kept: list[Any] = []  # what is compared by identity, so that no new object gets the same one
        self._seen: dict[int, int] = {}
        waiting = deque(roots)
        while waiting and len(self._seen) < MOST_OBJECTS:
            waiting.extend(self._look_at(waiting.popleft()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Snapshot) and self._tokens == other._tokens

    __hash__ = None  # type: ignore[assignment]

    def _look_at(self, one: Any) -> Iterable[Any]:
        """Note what an object is, and return what it refers to."""
        kind = type(one)
        if isinstance(one, _PLAIN) or (isinstance(one, str | bytes) and len(one) <= LONG):
            self._tokens.append((kind, repr(one)))
            return ()
        if id(one) in self._seen:
            self._tokens.append(self._seen[id(one)])
            return ()
        self._seen[id(one)] = len(self._seen)
        self._kept.append(one)
        if isinstance(one, torch.Tensor):
            self._tokens.append((id(one), tuple(one.shape), one._version))
            return ()
        if isinstance(one, np.ndarray):
            contents = one.tobytes() if one.nbytes <= SMALL_ARRAY and one.dtype != object else b""
            self._tokens.append((id(one) if not contents else kind, one.shape, one.dtype.str, contents))
            return ()
        inside = list(_inside(one))
        self._tokens.append((kind, len(inside), _length(one)) if inside or _is_container(one) else (kind, id(one)))
        return inside


def _is_container(one: Any) -> bool:
    return isinstance(one, list | tuple | dict | set | frozenset | deque)


def _length(one: Any) -> int:
    return len(one) if _is_container(one) else 0


def _inside(one: Any) -> Iterator[Any]:
    if isinstance(one, Mapping) and _is_container(one):
        few = islice(one.items(), LONG if len(one) <= LONG else 16)
        yield from (part for item in few for part in item)
    elif isinstance(one, AbstractSet) and _is_container(one):
        yield from islice(one, LONG if len(one) <= LONG else 16)
    elif _is_container(one):
        yield from one if len(one) <= LONG else (one[place * (len(one) - 1) // 15] for place in range(16))
    elif isinstance(one, types.FunctionType):
        yield one.__code__
        yield from one.__defaults__ or ()
        yield from _cells(one)
    elif isinstance(one, types.MethodType):
        yield from (one.__func__, one.__self__)
    elif isinstance(one, partial):
        yield from (one.func, one.args, one.keywords)
    elif not isinstance(one, type | types.ModuleType | types.CodeType):
        yield from _attributes(one)


def _cells(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not assigned yet
            yield None


def _attributes(one: Any) -> Iterator[Any]:
    named = getattr(one, "__dict__", None)
    if isinstance(named, dict):
        yield from (part for item in named.items() for part in item)
    for kind in type(one).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            descriptor = kind.__dict__.get(name)
            if isinstance(descriptor, types.MemberDescriptorType):
                try:
                    yield descriptor.__get__(one)
                except AttributeError:  # not assigned
                    yield None
