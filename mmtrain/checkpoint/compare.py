"""Compares two checkpoints bit for bit: tensors, plain state and generators, group by group."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmtrain.checkpoint import Checkpoint
from mmtrain.checkpoint.foreign import deepspeed_files

# Scalars that measure the machine, not the run. A checkpoint holds those of the current log interval.
MEASURED = ("time", "*_time", "eta", "memory", "save_*")
_SECTIONS = ("model", "optimizer")  # compared first: a difference in the weights is what users look for
ABSENT = object()  # in place of an entry that only the other one has
Names = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Difference:
    """One difference.

    ``what`` names the entry (``tensor model/layers.0.weight``), ``how`` describes the difference
    (``max abs difference 1.2e-07 in 3 of 48 elements``).
    """

    what: str
    how: str

    def __str__(self) -> str:
        return f"{self.what}: {self.how}"


@dataclass
class ComparedGroup:
    """Entries of one kind: how many were compared, and the differences in the order of comparison."""

    name: str
    compared: int = 0
    differences: list[Difference] = field(default_factory=list)

    def add(self, what: str, how: str) -> None:
        """Count one compared entry; an empty ``how`` means that it does not differ."""
        self.compared += 1
        if how:
            self.differences.append(Difference(what, how))


def compare_checkpoints(
    a: Checkpoint, b: Checkpoint, *, ignore: Iterable[str] = (), names: Names = ("A", "B")
) -> list[ComparedGroup]:
    """Compare everything in two checkpoints except the scalars in `MEASURED` and the state that ``ignore`` matches.

    There is a group for each section of tensors, each entry of the state, and the generators. ``names`` are the names
    of the two checkpoints in the differences.
    """
    sections = dict.fromkeys([*_SECTIONS, *a.sections(), *b.sections()])
    groups = [_section(a, b, section, names) for section in sections]
    groups.append(_engine_files(a, b, names))
    groups += _states(a.state_by_name(), b.state_by_name(), [*ignore], names)
    groups += _ranks(a, b, [*ignore], names)
    return [group for group in groups if group.compared]


def first_difference(groups: Sequence[ComparedGroup]) -> Difference | None:
    """The first difference of the first group that has one, or None."""
    return next((group.differences[0] for group in groups if group.differences), None)


def ignored(names: Iterable[str], patterns: Iterable[str]) -> bool:
    """Whether any of the names matches any of the patterns (``*`` and ``?`` as in a shell)."""
    patterns = list(patterns)
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def tensor_difference(a: Tensor, b: Tensor) -> str:
    """How two CPU tensors differ; an empty string if they are bit-for-bit equal."""
    if a.dtype != b.dtype or a.shape != b.shape or (a.layout is torch.strided) != (b.layout is torch.strided):
        return f"{_kind(a)} != {_kind(b)}"
    if torch.strided not in (a.layout, b.layout):
        same = a.layout == b.layout and not tensor_difference(a.to_dense(), b.to_dense())
        return "" if same else "the sparse tensors differ"
    bits_a, bits_b = _bits(a), _bits(b)
    if torch.equal(bits_a, bits_b):
        return ""
    differing = int((bits_a != bits_b).reshape(a.numel(), -1).any(1).sum())
    return f"{_distance(a, b)} in {differing:,} of {a.numel():,} elements"


def difference(a: Any, b: Any, names: Names) -> str:
    """`value_difference` of two entries, either of which may be `ABSENT`."""
    if a is ABSENT or b is ABSENT:
        return "" if a is b else f"only in {names[a is ABSENT]}"
    return value_difference(a, b)


def value_difference(a: Any, b: Any) -> str:
    """How two plain values, arrays or tensors differ; an empty string if they are bit-for-bit equal."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return tensor_difference(a, b)
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        same = (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes()
        return "" if same else "the arrays differ"
    # repr() is equal for equal floats and for two NaNs, and differs for -0.0 and 0.0
    return "" if type(a) is type(b) and repr(a) == repr(b) else f"{_short(a)} != {_short(b)}"


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the leaves of nested state with their paths. An empty container is a leaf."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from leaves(item, (*path, str(key)))
    elif isinstance(value, (list, tuple)) and value:
        for index, item in enumerate(value):
            yield from leaves(item, (*path, str(index)))
    else:
        yield path, value


# ---- groups -------------------------------------------------------------------------------------------------------
def _engine_files(a: Checkpoint, b: Checkpoint, names: Names) -> ComparedGroup:
    """The files that DeepSpeed wrote, except for the copy of its config in them."""
    group = ComparedGroup("DeepSpeed's files")
    ours, theirs = (_engine_leaves(checkpoint) for checkpoint in (a, b))
    for path in {**ours, **theirs}:
        group.add(" ".join(path), difference(ours.get(path, ABSENT), theirs.get(path, ABSENT), names))
    return group


def _engine_leaves(checkpoint: Checkpoint) -> dict[tuple[str, ...], Any]:
    files = deepspeed_files.contents(checkpoint.path)
    return {path: leaf for name, held in files for path, leaf in leaves(held, (name,)) if "ds_config" not in path}


def _section(a: Checkpoint, b: Checkpoint, section: str, names: Names) -> ComparedGroup:
    group = ComparedGroup(f"{section} tensors")
    ours, theirs = (dict.fromkeys(checkpoint.tensor_names(section)) for checkpoint in (a, b))
    for name in {**ours, **theirs}:  # only one pair in memory at a time
        if name in ours and name in theirs:
            how = tensor_difference(a.read(section, name), b.read(section, name))
        else:
            how = f"only in {names[name not in ours]}"
        group.add(f"tensor {section}/{name}", how)
    return group


def _states(a: Mapping[str, Any], b: Mapping[str, Any], ignore: list[str], names: Names) -> list[ComparedGroup]:
    groups = []
    for name in dict.fromkeys([*a, *b]):
        ours, theirs = (state.get(name, ABSENT) for state in (a, b))
        if name == "log":
            ours, theirs = _unmeasured(ours), _unmeasured(theirs)
        group = ComparedGroup(f"state {name}")
        _compare_leaves(group, name, (ours, theirs), ignore, names)
        groups.append(group)
    return groups


def _compare_leaves(group: ComparedGroup, name: str, pair: tuple[Any, Any], ignore: list[str], names: Names) -> None:
    ours, theirs = (dict(leaves(value)) for value in pair)
    for path in dict.fromkeys([*ours, *theirs]):
        dotted = ".".join((name, *path))
        if not ignored([dotted, *path], ignore):
            how = difference(ours.get(path, ABSENT), theirs.get(path, ABSENT), names)
            group.add(f"state {dotted}", how)


def _unmeasured(value: Any) -> Any:
    """Nested state without the entries that match `MEASURED`."""
    if isinstance(value, Mapping):
        return {key: _unmeasured(item) for key, item in value.items() if not ignored([str(key)], MEASURED)}
    return [_unmeasured(item) for item in value] if isinstance(value, list) else value


def _ranks(a: Checkpoint, b: Checkpoint, ignore: list[str], names: Names) -> list[ComparedGroup]:
    """The state that each rank saves separately: its generators, and the state of its data loading."""
    generators, others = ComparedGroup("generators"), ComparedGroup("state of ranks")
    for rank in range(max(a.manifest.world_size, b.manifest.world_size)):
        ours, theirs = (_of_rank(checkpoint, rank) for checkpoint in (a, b))
        pair = ours.pop("generators", {}), theirs.pop("generators", {})
        for name in dict.fromkeys([*pair[0], *pair[1]]):
            if name in pair[0] and name in pair[1]:
                how = "" if _same_leaves(pair[0][name], pair[1][name]) else "its state differs"
            else:
                how = f"only in {names[name not in pair[0]]}"
            generators.add(f"generator {name} of rank {rank}", how)
        _compare_leaves(others, f"rank_{rank}", (ours, theirs), ignore, names)
    return [generators, others]


def _of_rank(checkpoint: Checkpoint, rank: int) -> dict[str, Any]:
    value = checkpoint.rng(rank)
    named = dict(value) if isinstance(value, Mapping) else {} if value is None else {"value": value}
    if not isinstance(named.get("generators", {}), Mapping):
        named["value"] = named.pop("generators")
    return named


def _same_leaves(a: Any, b: Any) -> bool:
    ours, theirs = dict(leaves(a)), dict(leaves(b))
    return ours.keys() == theirs.keys() and not any(value_difference(ours[path], theirs[path]) for path in ours)


# ---- text ---------------------------------------------------------------------------------------------------------
def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _distance(a: Tensor, b: Tensor) -> str:
    wide = torch.complex128 if a.is_complex() else torch.float64
    distance = (a.to(wide) - b.to(wide)).abs()
    distance = distance[(a.reshape(-1) != b.reshape(-1)).reshape(distance.shape)]  # equal infinities: inf - inf is NaN
    if distance.isnan().any():
        return "NaN versus a number" if a.isnan().any() != b.isnan().any() else "NaN at different positions"
    if not distance.numel():
        return "equal values with different bits (the sign of zero)"
    return f"max abs difference {distance.max().item():.3g}"


def _kind(tensor: Tensor) -> str:
    sparse = "" if tensor.layout is torch.strided else "sparse "
    return f"{sparse}{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _short(value: Any) -> str:
    if isinstance(value, (Tensor, np.ndarray)):
        return f"a {type(value).__name__} {list(value.shape)}"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
