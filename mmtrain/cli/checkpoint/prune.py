"""``checkpoint prune``: delete old checkpoints."""

import argparse
from pathlib import Path

from mmtrain.checkpoint import CheckpointStore, Retention, RetirePolicy, WorkDirLock, to_delete
from mmtrain.checkpoint.discover import newest_good
from mmtrain.cli.checkpoint.find import find_all, work_dir
from mmtrain.cli.checkpoint.listing import best_records
from mmtrain.cli.checkpoint.text import counted, echo, size
from mmtrain.errors import ConfigError, RunError


def prune(arguments: argparse.Namespace) -> int:
    """Delete the checkpoints that the policy does not keep. Damaged ones and copies are neither counted nor deleted."""
    for option, value in (("--keep", arguments.keep), ("--keep-every", arguments.keep_every)):
        if value is not None and value < 1:
            raise ConfigError(f"{option} is {value}; expected 1 or more")
    root = work_dir(arguments.work_dir)
    policy = Retention(
        max_keep_ckpts=arguments.keep,
        keep_every=arguments.keep_every or 0,
        unit="epoch" if arguments.by_epoch else "iteration",
    )
    if not find_all(root, verify="none"):  # it may not be a work dir: do not leave a lock file there
        echo(f"there is no checkpoint in {root}")
        return 0
    if arguments.dry_run:
        return _prune(root, policy, dry_run=True)
    try:
        lock = WorkDirLock(root).acquire(wait_seconds=0)  # a run that writes here deletes old checkpoints itself
    except OSError as error:
        raise RunError(f"cannot write to {root}: {error.strerror or error}") from error
    with lock:
        return _prune(root, policy, dry_run=False)


def _prune(root: Path, policy: Retention, *, dry_run: bool) -> int:
    store = CheckpointStore(root)
    newest, problems = newest_good(root, verify="full")  # by hash: a file of the right size may still be damaged
    best = {record.get("checkpoint") for record in best_records(root).values()}
    retire = RetirePolicy(policy, frozenset(name for name in (newest and newest.name, *best) if name))
    entries = {entry.name: entry for entry in store.entries()}
    try:
        doomed = to_delete(list(entries.values()), retire.keep, retire.protected) if dry_run else store.prune(retire)
    except OSError as error:
        raise RunError(f"a checkpoint in {root} could not be deleted: {error}") from error
    for name in doomed:
        echo(f"{'would delete' if dry_run else 'deleted'} {name} ({size(entries[name].bytes)})")
    for entry in entries.values():
        if not entry.is_original:
            echo(f"left alone: {entry.name} was not saved under this name")
    for problem in problems:
        echo(f"left alone: {problem}")
    freed = size(sum(entries[name].bytes for name in doomed))
    kept = counted(len(entries) - len(doomed), "checkpoint")
    echo(f"would keep {kept} and free {freed}" if dry_run else f"kept {kept}, freed {freed}")
    return 0
