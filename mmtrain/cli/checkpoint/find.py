"""Which checkpoint a path on the command line means."""

import os
import sys
from pathlib import Path

from mmtrain.checkpoint import Checkpoint, open_checkpoint
from mmtrain.checkpoint.discover import newest_good
from mmtrain.checkpoint.format.index import INDEX
from mmtrain.checkpoint.format.manifest import MANIFEST
from mmtrain.checkpoint.format.verify import Verify
from mmtrain.errors import CheckpointError, ConfigError


def is_checkpoint(path: Path) -> bool:
    """Whether a directory is a checkpoint, good or not, and no work dir."""
    return path.suffix == ".pth" or any((path / name).exists() for name in (MANIFEST, INDEX, "state.json"))


def existing_directory(path: str | Path) -> Path:
    """The directory that a path names. Raises ConfigError for anything else, and where it cannot be read."""
    found = Path(path).expanduser()
    try:
        os.scandir(found).close()
    except NotADirectoryError as error:
        wanted = "expected a work dir, or a checkpoint of mmtrain, which is a directory"
        raise ConfigError(f"{found} is a file; {wanted}") from error
    except FileNotFoundError as error:
        raise ConfigError(f"{found} does not exist; expected a work dir or a checkpoint in one") from error
    except OSError as error:
        raise ConfigError(f"{found} cannot be read: {error.strerror or error}") from error
    return found


def work_dir(path: str | Path) -> Path:
    """The work dir that a path names. Raises ConfigError where it is a checkpoint or no directory."""
    found = existing_directory(path)
    if is_checkpoint(found):
        raise ConfigError(f"{found} is a checkpoint; expected the directory it lies in")
    return found


def find_checkpoint(path: str | Path, *, verify: Verify = "size") -> Checkpoint:
    """Open a checkpoint: the directory itself, or the newest good one of a work dir, without changing anything there.

    Those passed over on the way to the newest good one are told on standard error. Raises ConfigError where the path
    leads to no checkpoint, CheckpointError where what it leads to is damaged.
    """
    found = existing_directory(path)
    if is_checkpoint(found):
        return open_checkpoint(found, verify=verify)
    entry, problems = newest_good(found, verify=verify)
    if entry is None and problems:
        raise CheckpointError(f"no checkpoint in {found} is good: {'; '.join(map(str, problems))}")
    if entry is None:
        raise ConfigError(f"{found} holds no checkpoint")
    for problem in problems:
        sys.stderr.write(f"skipped: {problem}\n")
    return open_checkpoint(found / entry.name, verify="none")
