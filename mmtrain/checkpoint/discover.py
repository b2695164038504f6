"""Which checkpoints a directory contains: found by looking, never by a pointer."""

import os
import re
from pathlib import Path

from mmtrain.checkpoint.format.manifest import MANIFEST, Manifest
from mmtrain.checkpoint.format.verify import Problem, Verify, find_problems, read_manifest
from mmtrain.checkpoint.retention import Entry
from mmtrain.errors import CheckpointError

_NUMBERED = re.compile(r"_\d+\.pth$")


def scan(root: Path, *, verify: Verify = "size") -> tuple[list[Entry], list[Problem]]:
    """Return the complete checkpoints in ascending order of iteration, and what is wrong with the others.

    A directory counts as a checkpoint if it has a manifest, or is named like one (``iter_500.pth``).
    """
    entries, problems = [], []
    for path in _candidates(root):
        manifest, faults = inspect(path, verify=verify)
        problems += faults
        if manifest is not None and not faults:
            entries.append(entry_of(path, manifest))
    return sorted(entries, key=age), problems


def inspect(path: Path, *, verify: Verify) -> tuple[Manifest | None, list[Problem]]:
    """Read the manifest of one checkpoint and compare its files."""
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        fault = str(error).removeprefix(f"{path / MANIFEST}: ")
        return None, [Problem(path.name, MANIFEST, fault)]
    return manifest, find_problems(path, manifest, verify=verify)


def newest_good(root: Path, *, verify: Verify) -> tuple[Entry | None, list[Problem]]:
    """Return the newest checkpoint that verifies, and what is wrong with newer ones.

    Damaged ones of unknown age (an unreadable manifest) are always reported.
    """
    problems: list[Problem] = []
    ordered: list[Entry] = []
    for path in _candidates(root):
        manifest, faults = inspect(path, verify="none")
        problems += faults
        if manifest is not None:
            ordered.append(entry_of(path, manifest))
    for entry in sorted(ordered, key=age, reverse=True):
        _, faults = inspect(root / entry.name, verify=verify)
        if not faults:
            return entry, problems
        problems += faults
    return None, problems


def entry_of(path: Path, manifest: Manifest) -> Entry:
    """The entry of a checkpoint. Its name is the directory's, which a user may have changed."""
    window = manifest.meta.get("accumulative_counts", 1)  # the last window of an epoch may reach into the next one
    return Entry(
        name=path.name,
        iteration=manifest.iteration,
        epoch=manifest.epoch,
        temporary=manifest.temporary,
        created=manifest.created,
        bytes=manifest.bytes,
        in_epoch=manifest.position.get("epoch_iteration", 0) >= window,
        generation=manifest.generation,
        run=manifest.run,
        is_original=path.name == manifest.name and not path.is_symlink(),
    )


def age(entry: Entry) -> tuple[int, int, str, str]:
    """The sort key of checkpoints: the generation, the iteration, then the time of saving."""
    return entry.generation, entry.iteration, entry.created, entry.name


def _candidates(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    paths = (path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith("."))
    return [path for path in paths if is_candidate(path)]


def is_candidate(path: Path) -> bool:
    """Whether a directory counts as a checkpoint, complete or not."""
    return bool(_NUMBERED.search(path.name) or _has_manifest(path)) and not _is_alias(path)


def _has_manifest(path: Path) -> bool:
    # unlike Path.exists it does not stop at a directory of another user, as lost+found is
    return os.path.exists(path / MANIFEST)  # noqa: PTH110


def _is_alias(path: Path) -> bool:
    """Whether it is a link to a neighbor (``latest.pth``): counted twice, the checkpoint behind it could be deleted."""
    return path.is_symlink() and path.resolve().parent == path.parent.resolve()
