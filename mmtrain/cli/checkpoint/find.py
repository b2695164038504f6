"""Which checkpoints a path on the command line means."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from mmtrain.checkpoint import Checkpoint, Manifest, Problem, open_checkpoint
from mmtrain.checkpoint.discover import inspect, newest_good, scan
from mmtrain.checkpoint.format.index import INDEX
from mmtrain.checkpoint.format.manifest import MANIFEST
from mmtrain.checkpoint.format.verify import Verify
from mmtrain.cli.checkpoint.text import warn
from mmtrain.errors import CheckpointError, ConfigError


@dataclass
class FoundCheckpoint:
    """A checkpoint directory, good or damaged; ``manifest`` is None if it cannot be read."""

    name: str
    manifest: Manifest | None
    problems: list[Problem] = field(default_factory=list)


def is_checkpoint(path: Path) -> bool:
    """Whether a directory is a checkpoint, good or damaged, rather than a work dir."""
    return path.suffix == ".pth" or any((path / name).exists() for name in (MANIFEST, INDEX, "state.json"))


def existing_directory(path: str | Path) -> Path:
    """The directory that a path names. Raises ConfigError if it is not a directory or cannot be read."""
    found = Path(path).expanduser()
    try:
        os.scandir(found).close()
    except NotADirectoryError as error:
        raise ConfigError(f"{found} is a file; expected a work dir or an mmtrain checkpoint (a directory)") from error
    except FileNotFoundError as error:
        raise ConfigError(f"{found} does not exist; expected a work dir or a checkpoint") from error
    except OSError as error:
        raise ConfigError(f"{found} cannot be read: {error.strerror or error}") from error
    return found


def work_dir(path: str | Path) -> Path:
    """The work dir that a path names. Raises ConfigError if it is a checkpoint or not a directory."""
    found = existing_directory(path)
    if is_checkpoint(found):
        raise ConfigError(f"{found} is a checkpoint; expected the directory that contains it")
    return found


def find_checkpoint(path: str | Path, *, verify: Verify = "size") -> Checkpoint:
    """Open the checkpoint at ``path``, or the newest good one if ``path`` is a work dir. Changes nothing on disk.

    Damaged checkpoints that are newer are reported on standard error. Raises ConfigError if there is no checkpoint,
    and CheckpointError if the checkpoint, or every checkpoint of the work dir, is damaged.
    """
    found = existing_directory(path)
    if is_checkpoint(found):
        return open_checkpoint(found, verify=verify)
    entry, problems = newest_good(found, verify=verify)
    if entry is None and problems:
        raise CheckpointError(f"every checkpoint in {found} is damaged: {'; '.join(map(str, problems))}")
    if entry is None:
        raise ConfigError(f"there is no checkpoint in {found}")
    for problem in problems:
        warn(f"skipped: {problem}")
    return open_checkpoint(found / entry.name, verify="none")


def find_all(root: Path, *, verify: Verify) -> list[FoundCheckpoint]:
    """All checkpoints of a directory, good and damaged, oldest first; those without a readable manifest come last."""
    entries, problems = scan(root, verify=verify)
    names = {entry.name for entry in entries} | {problem.checkpoint for problem in problems}
    found = [
        FoundCheckpoint(name, inspect(root / name, verify="none")[0], [p for p in problems if p.checkpoint == name])
        for name in names
    ]
    return sorted(found, key=_age)


def _age(one: FoundCheckpoint) -> tuple[bool, int, int, str, str]:
    manifest = one.manifest
    if manifest is None:
        return True, 0, 0, "", one.name
    return False, manifest.generation, manifest.iteration, manifest.created, one.name
