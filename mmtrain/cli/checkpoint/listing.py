"""``checkpoint list``: a table of the checkpoints of a work dir."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmtrain.checkpoint import CheckpointStore
from mmtrain.checkpoint.format import check
from mmtrain.cli.checkpoint.find import FoundCheckpoint, find_all, work_dir
from mmtrain.cli.checkpoint.text import echo, size, table, when
from mmtrain.errors import CheckpointError, RunError
from mmtrain.files import read_bounded

_BEST_LIMIT = 1 << 20


def list_checkpoints(arguments: argparse.Namespace) -> int:
    """Print a table of the checkpoints of a work dir, then the faults of damaged ones."""
    root = work_dir(arguments.work_dir)
    found = find_all(root, verify="full" if arguments.full else "size")
    if not found:
        echo(f"there is no checkpoint in {root}")
        return 0
    marks = _marks(root, found)
    head = ("NAME", "ITER", "EPOCH", "SIZE", "CREATED", "WORLD", "STRATEGY", "GOOD", "MARKS")
    rows = [head, *(_row(one, marks.get(one.name, [])) for one in found)]
    echo("\n".join(table(rows, right=(1, 2, 3, 5))))
    problems = [problem for one in found for problem in one.problems]
    if problems:
        echo("\n" + "\n".join(f"damaged: {problem}" for problem in problems))
    pointer = CheckpointStore(root).pointer()
    if pointer is not None and pointer not in marks:
        echo(f"\nlast_checkpoint names {pointer}, which does not exist; resuming does not depend on it")
    return 0


def _row(one: FoundCheckpoint, marks: list[str]) -> tuple[str, ...]:
    good, manifest = "NO" if one.problems else "yes", one.manifest
    if manifest is None:
        return (one.name, "?", "?", "?", "?", "?", "?", good, ", ".join(marks))
    return (
        one.name, str(manifest.iteration), str(manifest.epoch), size(manifest.bytes), when(manifest.created),
        str(manifest.world_size), manifest.strategy.removesuffix("Strategy"), good, ", ".join(marks),
    )  # fmt: skip


def _marks(root: Path, found: list[FoundCheckpoint]) -> dict[str, list[str]]:
    marks: dict[str, list[str]] = {one.name: [] for one in found}
    good = [one.name for one in found if not one.problems]
    if good:
        marks[good[-1]].append("newest")
    for one in found:
        if one.manifest is not None and one.manifest.temporary:
            marks[one.name].append("temporary")
    for metric, record in best_records(root).items():
        if record.get("checkpoint") in marks:
            marks[record["checkpoint"]].append(f"best {metric}")
    pointer = CheckpointStore(root).pointer()
    if pointer in marks:
        marks[pointer].append("pointer")
    return marks


def best_records(root: Path) -> dict[str, Mapping[str, Any]]:
    """Read ``best.json``: the best value of each metric and its checkpoint; empty if there is no such file.

    Raises RunError if the file cannot be read, because then it is unknown which checkpoints to protect.
    """
    path = root / "best.json"
    try:
        document = check.parse(read_bounded(path, _BEST_LIMIT), str(path))
        check.values(document, check.OBJECT, "best")
        for metric, record in document.items():
            check.fields(record, {"checkpoint": check.TEXT.or_none()}, metric)
        return document
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, CheckpointError) as error:
        raise RunError(f"{path} cannot be read ({error}); fix or delete it") from error
