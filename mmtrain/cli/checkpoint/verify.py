"""``checkpoint verify``: check every file against its hash."""

import argparse
from pathlib import Path

from mmtrain.checkpoint import Manifest
from mmtrain.checkpoint.discover import inspect
from mmtrain.checkpoint.format.verify import files_here, parts_here
from mmtrain.cli.checkpoint.find import FoundCheckpoint, existing_directory, find_all, is_checkpoint
from mmtrain.cli.checkpoint.text import counted, echo, size
from mmtrain.errors import ConfigError


def verify(arguments: argparse.Namespace) -> int:
    """Hash every file of a checkpoint, or of all in a work dir. Print each fault; return 1 if there is any."""
    path = existing_directory(arguments.path)
    if is_checkpoint(path):
        root = path.parent
        found = [FoundCheckpoint(path.name, *inspect(path, verify="full"))]
    else:
        root = path
        found = find_all(path, verify="full")
    if not found:
        raise ConfigError(f"there is no checkpoint in {path}")
    for one in found:
        for problem in one.problems:
            echo(f"DAMAGED  {problem}")
        if one.manifest is not None and not one.problems:
            echo(f"good     {one.name} ({_on_disk(root / one.name, one.manifest)})")
    damaged = sum(bool(one.problems) for one in found)
    if damaged and len(found) > 1:
        good = [one.name for one in found if not one.problems]
        left = f"the newest good one is {good[-1]}" if good else "none is good"
        echo(f"{damaged} of {counted(len(found), 'checkpoint')} damaged; {left}")
    return 1 if damaged else 0


def _on_disk(path: Path, manifest: Manifest) -> str:
    files = files_here(path, manifest)
    text = f"{counted(len(files), 'file')}, {size(sum(manifest.files[name].size for name in files))}"
    here = len(parts_here(path, manifest))
    if here == len(manifest.parts):
        return text
    return f"{text}; {here} of {len(manifest.parts)} parts, the others are on other nodes"
