"""``checkpoint audit``: check from a run's ledger that no sample was lost or repeated."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmtrain.checkpoint import Checkpoint
from mmtrain.cli.checkpoint.find import find_checkpoint, is_checkpoint, work_dir
from mmtrain.cli.checkpoint.text import counted, echo, table
from mmtrain.data.ledger_audit import EpochAudit, audit_ledger
from mmtrain.errors import CheckpointError
from mmtrain.printable import reason


def audit(arguments: argparse.Namespace) -> int:
    """Print what all updates up to a checkpoint read. Return 1 if a sample was lost or repeated."""
    path: str | Path = arguments.work_dir
    if arguments.checkpoint is not None:
        named = Path(arguments.checkpoint)
        path = named if named.is_dir() and is_checkpoint(named) else work_dir(path) / named
    checkpoint = find_checkpoint(path, verify="full")
    record = checkpoint.state_by_name().get("ledger")
    if record is None:
        raise CheckpointError(
            f"{checkpoint.path} has no ledger, so the samples that its run consumed are unknown; train with "
            "train_cfg=dict(ledger=True, ...)"
        )
    position = checkpoint.manifest.position
    try:
        epochs = audit_ledger(_at_checkpoint(record, checkpoint))
        segments = _segments(record["segments"])
        done = f"{counted(position['update'], 'update')}, {counted(position['samples'], 'sample')}"
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint.path}: its ledger is malformed ({reason(error)})") from error
    echo(f"{checkpoint.path}: {done}")
    echo("\n".join(["", *segments, "", *_epochs(epochs)]))
    notices = [(one, text) for one in epochs for text in one.notices]
    faults = [(one, text) for one in epochs for text in one.faults]
    for title, lines in (("by design", notices), ("faults", faults)):
        if lines:
            echo("\n".join(["", title, *(f"  epoch {one.epoch + 1}: {text}" for one, text in lines)]))
    lost, repeated, unproven = (sum(getattr(one, kind) for one in epochs) for kind in ("lost", "repeated", "unproven"))
    echo(f"\nsamples lost: {lost}, repeated: {repeated}" + (f", unproven: {unproven}" if unproven else ""))
    return 1 if lost or repeated or unproven else 0


def _at_checkpoint(record: Mapping[str, Any], checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The record with the position of the checkpoint, where a resume continues, and the samples consumed up to it."""
    position = checkpoint.manifest.position
    return {**record, "position": [position["epoch"], position["offset"]], "samples": position["samples"]}


def _segments(segments: list[dict[str, Any]]) -> list[str]:
    """Where the batch size or world size changed; each segment counts iterations at its batch size."""
    rows = [("FROM ITERATION", "UPDATE", "EPOCH", "SAMPLE", "WORLD", "BATCH", "ACCUMULATION", "ORDER")]
    for one in segments:
        order = one["order"]
        shuffled = f"seed {order.get('seed')}" if order.get("shuffle") else "as stored"
        rows.append((
            f"{one['iteration']:,}", f"{one['update']:,}", str(one["position"][0] + 1), f"{one['position'][1]:,}",
            str(one["world_size"]), f"{one['batch_size']} x {one['world_size']}", str(one["accumulative_counts"]),
            order.get("sampler") or shuffled,
        ))  # fmt: skip
    return table(rows, right=range(7))


def _epochs(epochs: list[EpochAudit]) -> list[str]:
    rows = [("EPOCH", "UPDATES", "SAMPLES", "OF", "LOST", "REPEATED", "")]
    for one in epochs:
        updates = " to ".join(f"{number:,}" for number in sorted(set(one.updates))) if one.updates else "-"
        size = "?" if one.size is None else f"{one.size:,}"
        end = "" if one.finished else "not finished"
        rows.append((
            str(one.epoch + 1), updates, f"{one.samples:,}", size, f"{one.lost:,}", f"{one.repeated:,}", end,
        ))  # fmt: skip
    return table(rows, right=range(6))
