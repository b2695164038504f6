"""Nested plain values as JSON plus tensors, and back, exactly.

`split` turns what ``state_dict()`` functions return into one JSON value and a flat dict of tensors; `join` undoes it.
JSON has fewer types than Python, so the rest is written as an object with one key that begins with ``$``:

``{"$float": "<16 hex digits>"}`` infinities and NaNs, bit for bit · ``{"$int": "<hex>"}`` beyond 64 bits ·
``{"$bytes": "<base64>"}`` · ``{"$tuple": [..]}`` · ``{"$set": [..]}`` · ``{"$frozenset": [..]}`` ·
``{"$deque": [..], "maxlen": ..}`` · ``{"$ordered": [[key, value], ..]}`` an OrderedDict · ``{"$dict": [[key, value],
..]}`` a dict whose keys are not all plain strings · ``{"$tensor": key}`` · ``{"$array": key, "dtype": .., "shape":
[..]}`` a numpy array, its bytes kept as a uint8 tensor · ``{"$scalar": "<base64>", "dtype": ..}`` a numpy scalar ·
``{"$sparse": layout, "shape": [..], "parts": [..], ..}`` a sparse tensor, its indices and values kept as tensors.
"""

import base64
import json
import math
import re
import struct
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmtrain.checkpoint.format import check as format_check
from mmtrain.dtensor import is_dtensor
from mmtrain.errors import CheckpointError
from mmtrain.printable import reason

_NUMPY_TYPE = re.compile(r"[<>|=][?a-zA-Z]\d*(\[\w+\])?")  # what dtype.str gives: "<f8", "<M8[ns]"
_MALFORMED = (LookupError, ValueError, TypeError, AttributeError, OverflowError, RuntimeError, struct.error)
_INT64 = range(-(1 << 63), 1 << 63)
_ROWS, _COLUMNS = ("crow_indices", "col_indices", "values"), ("ccol_indices", "row_indices", "values")
_SPARSE_PARTS = {
    torch.sparse_coo: ("_indices", "_values"),  # as they are: the public names want the sum of repeated elements
    torch.sparse_csr: _ROWS, torch.sparse_bsr: _ROWS, torch.sparse_csc: _COLUMNS, torch.sparse_bsc: _COLUMNS,
}  # fmt: skip


def split(value: Any, *, path: str = "state") -> tuple[Any, dict[str, Tensor]]:
    """Return ``value`` as a JSON value, and the tensors in it (copied to the CPU) by a key that says where they were.

    Raises CheckpointError with the path and the type of what is neither plain nor a tensor.
    """
    tensors: dict[str, Tensor] = {}
    try:
        return _Splitter(tensors).encode(value, path, ()), tensors
    except RecursionError as error:
        raise CheckpointError(f"{path}: it is nested too deeply to be saved") from error


def join(document: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo `split`. Raises CheckpointError if ``document`` is not something that `split` gave."""
    try:
        return _join(document, tensors)
    except RecursionError as error:
        raise CheckpointError("the state is nested too deeply") from error


def _join(document: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(document, list):
        return [_join(item, tensors) for item in document]
    if not isinstance(document, dict):
        return document
    tag = next(iter(document), "")
    if not tag.startswith("$"):
        return {key: _join(item, tensors) for key, item in document.items()}
    decoder = _DECODERS.get(tag)
    if decoder is None:
        raise CheckpointError(
            f"the state contains a value of an unknown kind {tag!r}; a newer mmtrain may have written it"
        )
    try:
        return decoder(document, tensors)
    except _MALFORMED as error:
        raise CheckpointError(f"the state contains a malformed {tag} value: {reason(error)}") from error


class _Blanks(dict[str, Tensor]):
    """Tensors of the right shapes without their values."""


def check(document: Any, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise CheckpointError where `join` would; ``shapes`` are those of the tensors, which need not be read."""
    blank = torch.zeros((), dtype=torch.uint8)
    try:
        tensors = _Blanks((name, blank.expand(tuple(shape))) for name, shape in shapes.items())
    except RuntimeError as error:  # more elements than torch can count
        raise CheckpointError(f"the state has an impossible tensor ({error})") from error
    join(document, tensors)


def to_json(document: Any) -> bytes:
    """The bytes of a JSON value from `split`. Raises CheckpointError if a reader would not take so many."""
    data = json.dumps(document, allow_nan=False, separators=(",", ":")).encode()
    format_check.size(data, "the state")
    return data


class _Splitter:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def encode(self, value: Any, path: str, parents: tuple[int, ...]) -> Any:
        kind = type(value)
        if value is None or kind in (bool, str):
            return value
        if kind is int:
            return value if value in _INT64 else {"$int": hex(value)}
        if kind is float:
            return value if math.isfinite(value) else {"$float": struct.pack(">d", value).hex()}
        if kind is bytes:
            return {"$bytes": base64.b64encode(value).decode()}
        if isinstance(value, Tensor | np.ndarray | np.generic):
            return self._tensor(value, path) if isinstance(value, Tensor) else self._numpy(value, path)
        if id(value) in parents:
            raise CheckpointError(f"{path}: it contains itself")
        return self._container(value, path, (*parents, id(value)))

    def _container(self, value: Any, path: str, parents: tuple[int, ...]) -> Any:
        kind = type(value)
        if kind in (dict, OrderedDict):
            return self._mapping(value, path, parents)
        if kind in (list, tuple, torch.Size):
            items = [self.encode(item, f"{path}[{i}]", parents) for i, item in enumerate(value)]
            return items if kind is list else {"$tuple": items}
        if kind is deque:
            items = [self.encode(item, f"{path}[{i}]", parents) for i, item in enumerate(value)]
            return {"$deque": items, "maxlen": value.maxlen}
        if kind in (set, frozenset):  # sorted: the same set always gives the same bytes
            items = [self.encode(item, f"{path}{{..}}", parents) for item in value]
            return {f"${kind.__name__}": sorted(items, key=json.dumps)}
        raise CheckpointError(
            f"{path}: a {kind.__module__}.{kind.__qualname__} cannot be saved; a state may contain None, bool, int, "
            "float, str, bytes, list, tuple, deque, set, dict, tensors and numpy values"
        )

    def _mapping(self, value: Mapping[Any, Any], path: str, parents: tuple[int, ...]) -> Any:
        plain = type(value) is dict and all(type(key) is str and not key.startswith("$") for key in value)
        if plain:
            return {key: self.encode(item, f"{path}.{key}", parents) for key, item in value.items()}
        pairs = [
            [self.encode(key, f"{path}.<key {key!r}>", parents), self.encode(item, f"{path}.{key}", parents)]
            for key, item in value.items()
        ]
        return {"$dict" if type(value) is dict else "$ordered": pairs}

    def _tensor(self, value: Tensor, path: str) -> dict[str, Any]:
        if value.layout in _SPARSE_PARTS and not is_dtensor(value):
            return self._sparse(value, path)
        if is_dtensor(value) or value.layout is not torch.strided or value.is_meta or value.is_quantized:
            raise CheckpointError(
                f"{path}: a {type(value).__name__} with layout {value.layout} on {value.device} cannot be part of a "
                "state; pass sharded tensors to the store as a section of tensors"
            )
        return {"$tensor": self._put(path, value.detach().to("cpu", copy=True))}

    def _sparse(self, value: Tensor, path: str) -> dict[str, Any]:
        parts = [getattr(value.detach(), method)() for method in _SPARSE_PARTS[value.layout]]
        document: dict[str, Any] = {"$sparse": str(value.layout).removeprefix("torch."), "shape": [*value.shape]}
        document["parts"] = [self._tensor(part, f"{path}.part{index}") for index, part in enumerate(parts)]
        if value.layout is torch.sparse_coo:
            document["coalesced"] = value.is_coalesced()
        return document

    def _numpy(self, value: Any, path: str) -> dict[str, Any]:
        known = isinstance(value, np.generic) or type(value) in (np.ndarray, np.memmap)  # a masked array has a mask too
        if not known or value.dtype.hasobject or value.dtype.fields is not None:
            raise CheckpointError(f"{path}: a {type(value).__name__} of type {value.dtype} cannot be saved")
        raw = value.tobytes()
        if isinstance(value, np.generic):
            return {"$scalar": base64.b64encode(raw).decode(), "dtype": value.dtype.str}
        data = torch.from_numpy(np.frombuffer(bytearray(raw), np.uint8).copy() if raw else np.empty(0, np.uint8))
        return {"$array": self._put(path, data), "dtype": value.dtype.str, "shape": list(value.shape)}

    def _put(self, path: str, tensor: Tensor) -> str:
        key, number = path, 1
        while key in self.tensors:  # {1: a, "1": b} gives one path twice
            number += 1
            key = f"{path}~{number}"
        self.tensors[key] = tensor
        return key


def _array(document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> np.ndarray:
    raw = tensors[document["$array"]].numpy().tobytes()
    return np.frombuffer(bytearray(raw), _numpy_type(document)).reshape(document["shape"])


def _numpy_type(document: Mapping[str, Any]) -> np.dtype:
    if not _NUMPY_TYPE.fullmatch(document["dtype"]):
        raise ValueError(f"{document['dtype']!r} is not a numpy type")
    return np.dtype(document["dtype"])


def _sparse(document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    layout = {str(known): known for known in _SPARSE_PARTS}[f"torch.{document['$sparse']}"]
    parts, size = [tensors[part["$tensor"]] for part in document["parts"]], torch.Size(document["shape"])
    if len(parts) != len(_SPARSE_PARTS[layout]):
        raise ValueError(f"{len(parts)} parts")
    if isinstance(tensors, _Blanks):
        return torch.zeros((), dtype=torch.uint8).expand(size)
    if layout is torch.sparse_coo:
        indices, values = parts
        coalesced = document["coalesced"]
        return torch.sparse_coo_tensor(indices, values, size, is_coalesced=coalesced, check_invariants=True)
    compressed, plain, values = parts
    return torch.sparse_compressed_tensor(compressed, plain, values, size, layout=layout, check_invariants=True)


def _pairs(items: list[Any], tensors: Mapping[str, Tensor]) -> list[tuple[Any, Any]]:
    return [(_join(key, tensors), _join(item, tensors)) for key, item in items]


_DECODERS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Tensor]], Any]] = {
    "$int": lambda d, t: int(d["$int"], 16),
    "$float": lambda d, t: struct.unpack(">d", bytes.fromhex(d["$float"]))[0],
    "$bytes": lambda d, t: base64.b64decode(d["$bytes"], validate=True),
    "$tuple": lambda d, t: tuple(_join(item, t) for item in d["$tuple"]),
    "$deque": lambda d, t: deque((_join(item, t) for item in d["$deque"]), d["maxlen"]),
    "$set": lambda d, t: {_join(item, t) for item in d["$set"]},
    "$frozenset": lambda d, t: frozenset(_join(item, t) for item in d["$frozenset"]),
    "$dict": lambda d, t: dict(_pairs(d["$dict"], t)),
    "$ordered": lambda d, t: OrderedDict(_pairs(d["$ordered"], t)),
    "$tensor": lambda d, t: t[d["$tensor"]],
    "$array": _array,
    "$sparse": _sparse,
    "$scalar": lambda d, t: np.ndarray((), _numpy_type(d), base64.b64decode(d["$scalar"]))[()],
}
