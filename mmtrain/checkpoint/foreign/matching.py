"""Matches weights from elsewhere with a model by name and shape, and copies what fits."""

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from mmtrain.checkpoint.reader import LoadReport
from mmtrain.dtensor import copy_from_full
from mmtrain.errors import CheckpointError
from mmtrain.printable import listed, printable

_SHOWN = 8


def revise(names: Iterable[str], revise_keys: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Give each name its revised one: every (pattern, replacement) applied in order with ``re.sub``, as in MMEngine.

    Raises CheckpointError if a pattern is not a regular expression, or two names become one.
    """
    revised: dict[str, str] = {}
    origin: dict[str, str] = {}
    for name in names:
        new = name
        for pattern, replacement in revise_keys:
            try:
                new = re.sub(pattern, replacement, new)
            except re.error as error:
                raise CheckpointError(
                    f"revise_keys: {pattern!r} -> {replacement!r} is not a valid pattern: {error}"
                ) from error
        if new in origin:
            raise CheckpointError(f"revise_keys: both {origin[new]!r} and {name!r} become {new!r}")
        origin[new] = name
        revised[name] = new
    return revised


def match(weights: Mapping[str, Tensor], model_state: Mapping[str, Tensor]) -> LoadReport:
    """Compare by name and shape; nothing is copied."""
    report = LoadReport(unexpected=[name for name in weights if name not in model_state])
    for name, target in model_state.items():
        if name not in weights:
            report.missing.append(name)
        elif weights[name].shape != target.shape:
            report.wrong_shape.append(f"{name} (there {list(weights[name].shape)}, here {list(target.shape)})")
        else:
            report.matched.append(name)
            if weights[name].dtype != target.dtype:
                report.cast.append(name)
    return report


def copy_matched(
    weights: Mapping[str, Tensor], model_state: Mapping[str, Tensor], *, source: str = "", allow_mismatch: bool = False
) -> LoadReport:
    """Copy what matches into ``model_state``, in place; targets may be parameters, on any device, or sharded.

    Raises CheckpointError, and changes nothing, when no name matches or a shape is wrong, unless ``allow_mismatch``.
    """
    report = match(weights, model_state)
    if not allow_mismatch and model_state and (not report.matched or report.wrong_shape):
        what = "a shape is wrong" if report.wrong_shape else "no name matches"
        raise CheckpointError(
            f"{source or 'the weights'}: {what}; "
            + "; ".join(describe(report))
            + "; see revise_keys, or load another file"
        )
    for name in report.matched:
        copy_from_full(model_state[name], weights[name])
    return report


def describe(report: LoadReport) -> list[str]:
    """Lines for the log: how many names matched, were missing, unexpected, of another shape or type, and the first
    few.
    """
    kinds = {
        "matched": report.matched,
        "missing (they keep their initial values)": report.missing,
        "unexpected (not used)": report.unexpected,
        "wrong shape": report.wrong_shape,
        "converted to another type": report.cast,
    }
    lines = []
    for what, names in kinds.items():
        if names or what == "matched":
            which = f": {listed(names, _SHOWN)}" if names and what != "matched" else ""
            lines.append(printable(f"{len(names)} {what}{which}"))
    return lines
