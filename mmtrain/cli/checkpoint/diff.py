"""``checkpoint diff``: the first difference between two checkpoints, and how many more there are."""

import argparse
from collections.abc import Sequence

from mmtrain.checkpoint import Checkpoint
from mmtrain.checkpoint.compare import ComparedGroup, compare_checkpoints, first_difference
from mmtrain.cli.checkpoint.find import find_checkpoint
from mmtrain.cli.checkpoint.text import counted, echo, table

_SHOWN = 20


def diff(arguments: argparse.Namespace) -> int:
    """Compare two checkpoints. Return 0 if every tensor, state and generator is bit-for-bit equal, else 1."""
    a, b = find_checkpoint(arguments.a), find_checkpoint(arguments.b)
    echo(f"A  {a.path}\nB  {b.path}\n")
    groups = compare_checkpoints(a, b, ignore=arguments.ignore)
    echo("\n".join(group_table(groups)))
    first = first_difference(groups)
    if first is None:
        echo("\nidentical, bit for bit (measured times and memory are not compared)")
    else:
        echo(f"\nfirst difference\n  {first}")
        more = _details(groups, limit=None if arguments.all else _SHOWN)
        if more:
            echo("\n".join(["\nall differences", *more]))
    notices = _configs(a, b)
    if notices:
        echo("\n".join(["\nthe configs differ (not counted as a difference)", *notices]))
    return 0 if first is None else 1


def group_table(groups: Sequence[ComparedGroup]) -> list[str]:
    """One line for each group: how many entries were compared, and how many differ."""
    rows = [("", "compared", "differ")]
    rows += [(group.name, f"{group.compared:,}", f"{len(group.differences):,}") for group in groups]
    return table(rows, right=(1, 2))


def _details(groups: Sequence[ComparedGroup], *, limit: int | None) -> list[str]:
    differences = [difference for group in groups for difference in group.differences]
    if len(differences) < 2:
        return []
    lines = table([(one.what, one.how) for one in differences[:limit]], indent="  ")
    left = len(differences) - len(lines)
    return [*lines, f"  and {left:,} more; --all lists them"] if left else lines


def _configs(a: Checkpoint, b: Checkpoint) -> list[str]:
    ours, theirs = (checkpoint.manifest.meta.get("config_values", {}) for checkpoint in (a, b))
    changed = [
        f"  {key}: {ours.get(key, '-')} != {theirs.get(key, '-')}"
        for key in dict.fromkeys([*ours, *theirs])
        if key != "work_dir" and ours.get(key) != theirs.get(key)
    ]
    if len(changed) > _SHOWN:
        changed[_SHOWN:] = [f"  and {counted(len(changed) - _SHOWN, 'value')} more"]
    return changed
