"""``checkpoint list``, ``verify`` and ``prune``: all checkpoints of a work dir."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmtrain.checkpoint import CheckpointStore, Manifest, Problem, Retention, WorkDirLock, to_delete
from mmtrain.checkpoint.discover import inspect, newest_good, scan
from mmtrain.checkpoint.format.verify import Verify, files_here, parts_here
from mmtrain.cli.checkpoint.find import existing_directory, is_checkpoint, work_dir
from mmtrain.cli.checkpoint.text import counted, size, table, when
from mmtrain.errors import ConfigError, RunError


@dataclass
class Found:
    """One checkpoint as it lies on the disk; ``manifest`` is None where it cannot be read."""

    name: str
    manifest: Manifest | None
    problems: list[Problem] = field(default_factory=list)


def look(root: Path, *, verify: Verify) -> list[Found]:
    """All checkpoints of a directory, good and bad, oldest first; unreadable ones come last."""
    entries, problems = scan(root, verify=verify)
    names = {entry.name for entry in entries} | {problem.checkpoint for problem in problems}
    found = [
        Found(name, inspect(root / name, verify="none")[0], [p for p in problems if p.checkpoint == name])
        for name in names
    ]
    return sorted(found, key=_age)


def _age(one: Found) -> tuple[bool, int, int, str, str]:
    manifest = one.manifest
    if manifest is None:
        return True, 0, 0, "", one.name
    return False, manifest.generation, manifest.iteration, manifest.created, one.name


# ---- list ---------------------------------------------------------------------------------------------------------
def list_checkpoints(arguments: argparse.Namespace) -> int:
    """Print a table of the checkpoints of a work dir; faults of the bad ones stand below it."""
    root = work_dir(arguments.work_dir)
    found = look(root, verify="full" if arguments.full else "size")
    if not found:
        print(f"{root} holds no checkpoint")
        return 0
    marks = _marks(root, found)
    head = ("NAME", "ITER", "EPOCH", "SIZE", "CREATED", "WORLD", "STRATEGY", "GOOD", "MARKS")
    rows = [head, *(_row(one, marks.get(one.name, [])) for one in found)]
    print("\n".join(table(rows, right=(1, 2, 3, 5))))
    problems = [problem for one in found for problem in one.problems]
    if problems:
        print("\n" + "\n".join(f"bad: {problem}" for problem in problems))
    pointer = CheckpointStore(root).pointer()
    if pointer is not None and pointer not in marks:
        print(f"\nlast_checkpoint names {pointer}, which is not here; resuming looks at the directory and goes on")
    return 0


def _row(one: Found, marks: list[str]) -> tuple[str, ...]:
    good, manifest = "NO" if one.problems else "yes", one.manifest
    if manifest is None:
        return (one.name, "?", "?", "?", "?", "?", "?", good, ", ".join(marks))
    return (
        one.name, str(manifest.iteration), str(manifest.epoch), size(manifest.bytes), when(manifest.created),
        str(manifest.world_size), manifest.strategy.removesuffix("Strategy"), good, ", ".join(marks),
    )  # fmt: skip


def _marks(root: Path, found: list[Found]) -> dict[str, list[str]]:
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
    """``best.json``: for each metric its best value and the checkpoint that has it; {} where there is none.

    Raises RunError where it is there and cannot be read, since nobody would know what to protect.
    """
    path = root / "best.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return {str(metric): dict(record) for metric, record in document.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise RunError(f"{path} cannot be read ({error}); mend it or delete it") from error


# ---- verify -------------------------------------------------------------------------------------------------------
def verify(arguments: argparse.Namespace) -> int:
    """Hash every file of one checkpoint, or of all in a work dir; one line per fault, status 1 where there is any."""
    path = existing_directory(arguments.path)
    if is_checkpoint(path):
        manifest, problems = inspect(path, verify="full")
        found = [Found(path.name, manifest, problems)]
    else:
        found = look(path, verify="full")
    if not found:
        raise ConfigError(f"{path} holds no checkpoint")
    for one in found:
        for problem in one.problems:
            print(f"BAD   {problem}")
        if one.manifest is not None and not one.problems:
            print(f"good  {one.name} ({_on_disk(path if is_checkpoint(path) else path / one.name, one.manifest)})")
    bad = sum(bool(one.problems) for one in found)
    if bad and len(found) > 1:
        good = [one.name for one in found if not one.problems]
        print(f"{bad} of {counted(len(found), 'checkpoint')} damaged; " + _remaining(good))
    return 1 if bad else 0


def _on_disk(path: Path, manifest: Manifest) -> str:
    files = files_here(path, manifest)
    told = f"{counted(len(files), 'file')}, {size(sum(manifest.files[name].size for name in files))}"
    here = len(parts_here(path, manifest))
    if here == len(manifest.parts):
        return told
    return f"{told}; {here} of its {len(manifest.parts)} parts, the others lie on the disks of other nodes"


def _remaining(good: list[str]) -> str:
    return f"the newest good one is {good[-1]}" if good else "none is good"


# ---- prune --------------------------------------------------------------------------------------------------------
def prune(arguments: argparse.Namespace) -> int:
    """Delete what the policy does not keep. Damaged checkpoints do not count and are left alone."""
    for option, value in (("--keep", arguments.keep), ("--keep-every", arguments.keep_every)):
        if value is not None and value < 1:
            raise ConfigError(f"{option} is {value}; expected 1 or more")
    root = work_dir(arguments.work_dir)
    policy = Retention(
        max_keep_ckpts=arguments.keep,
        keep_every=arguments.keep_every or 0,
        unit="epoch" if arguments.by_epoch else "iteration",
    )
    if not look(root, verify="none"):  # it may be anybody's directory: no lock is left there
        print(f"{root} holds no checkpoint")
        return 0
    if arguments.dry_run:
        return _prune(root, policy, dry=True)
    try:
        lock = WorkDirLock(root).acquire(wait_seconds=0)  # a run that writes here has a retention of its own
    except OSError as error:
        raise RunError(f"{root} cannot be written: {error.strerror or error}") from error
    with lock:
        return _prune(root, policy, dry=False)


def _prune(root: Path, policy: Retention, *, dry: bool) -> int:
    store = CheckpointStore(root)
    newest, problems = newest_good(root, verify="full")  # by hash: the newest by size may be the damaged one
    best = {record.get("checkpoint") for record in best_records(root).values()}
    store.protected = {name for name in (newest and newest.name, *best) if name}
    entries = {entry.name: entry for entry in store.entries()}
    try:
        doomed = to_delete(list(entries.values()), policy, store.protected) if dry else store.prune(policy)
    except OSError as error:
        raise RunError(f"a checkpoint in {root} could not be deleted: {error}") from error
    for name in doomed:
        print(f"{'would delete' if dry else 'deleted'} {name} ({size(entries[name].bytes)})")
    for problem in problems:
        print(f"left alone: {problem}")
    freed = size(sum(entries[name].bytes for name in doomed))
    stay = counted(len(entries) - len(doomed), "checkpoint")
    print(f"{stay} stay{'s' if stay.startswith('1 ') else ''}; {freed} {'would be ' if dry else ''}freed")
    return 0
