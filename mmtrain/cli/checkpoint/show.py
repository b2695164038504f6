"""``checkpoint show``: what a checkpoint holds, in words."""

import argparse
import json
from collections import Counter
from math import prod

from mmtrain.checkpoint import Checkpoint, Manifest
from mmtrain.checkpoint.format.index import TensorEntry
from mmtrain.checkpoint.reader import saved_dtype
from mmtrain.cli.checkpoint.find import find_checkpoint
from mmtrain.cli.checkpoint.text import counted, size, table, when
from mmtrain.errors import CheckpointError

_LARGEST = 5
_HOOKS = "hooks."


def show(arguments: argparse.Namespace) -> int:
    """Print one checkpoint: where its run stood, what wrote it, what it holds."""
    checkpoint = find_checkpoint(arguments.checkpoint)
    if arguments.config:
        print(checkpoint.manifest.config, end="")
        return 0
    lines = [str(checkpoint.path), *table(_facts(checkpoint.manifest), indent="  ")]
    rows = _tensor_rows(checkpoint)
    if rows:
        lines += ["", *table(_sections(checkpoint), right=(1, 2), indent="  ")]
    lines += ["", *_states(checkpoint), ""]
    if not rows:  # an engine's files, which say what they hold when they are loaded
        print("\n".join(lines[:-1]))
        return 0
    title = "tensors"
    if not arguments.tensors:
        title = f"largest tensors (of {len(rows)}; --tensors lists all)"
        rows = sorted(rows, key=lambda row: -row[0])[:_LARGEST]
    lines += [title, *table([cells for _, cells in rows], right=(2,), indent="  ")]
    print("\n".join(lines))
    return 0


def _facts(manifest: Manifest) -> list[tuple[str, str]]:
    position, meta = manifest.position, manifest.meta
    of = f" of {meta['samples_per_epoch']:,}" if meta.get("samples_per_epoch") else ""
    lengths = {"epochs": meta.get("max_epochs"), "iterations": meta.get("max_iters")}
    ends = " or ".join(f"{length:,} {unit}" for unit, length in lengths.items() if length)
    windows = counted(meta.get("accumulative_counts", 1), "iteration")
    moments = "" if meta.get("has_optimizer", True) else ", whose state was not saved"
    temporary = ", temporary: it goes when a newer one exists" if manifest.temporary else ""
    parts = f", divided among {len(manifest.parts)} disks" if manifest.parts else ""
    facts = [
        ("position", f"iteration {manifest.iteration:,}, update {position.get('update', 0):,}"),
        ("data", f"{counted(manifest.epoch, 'epoch')} done and {position.get('offset', 0):,}{of} samples of the next"),
        ("data set", manifest.data_fingerprint or "-"),
        ("run", f"{meta.get('experiment_name') or '-'}{f', of {ends}' if ends else ''}"),
        ("saved", when(manifest.created) + temporary),
        ("seed", str(manifest.seed)),
        ("world", f"{counted(manifest.world_size, 'process', 'processes')}, {manifest.strategy}"),
        ("batch", f"{meta.get('batch_size') or '?'} a process, {windows} an update"),
        ("optimizer", f"{meta.get('optimizer') or '-'}{moments}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in manifest.versions.items()) or "-"),
        ("on disk", f"{size(manifest.bytes)} in {counted(len(manifest.files), 'file')}{parts}"),
    ]
    native = meta.get("native")
    if native is not None:
        own = [record.size for path, record in manifest.files.items() if path.endswith("_states.pt")]
        facts.append(
            (
                "engine",
                f"DeepSpeed {native['version']}, ZeRO stage {native['stage']}, {native['dtype']}: weights and moments "
                f"in {counted(len(own), 'file')} of its own, {size(sum(own))}",
            )
        )
    if not manifest.has_frozen:
        facts.append(
            (
                "frozen",
                "not saved (save_frozen=False or exclude_frozen_parameters); they come from the build or load_from",
            )
        )
    return facts


def _sections(checkpoint: Checkpoint) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("section", "tensors", "size", "types")]
    for section in checkpoint.sections():
        entries = checkpoint.index[section].values()
        types = Counter(_type(entry) for entry in entries)
        told = ", ".join(name if len(types) == 1 else f"{name} x {count}" for name, count in types.most_common())
        rows.append((section, f"{len(entries):,}", size(sum(map(stored_bytes, entries))), told))
    return rows


def _states(checkpoint: Checkpoint) -> list[str]:
    """State by name. Only names are read: averages of weights may be as large as the model."""
    names = _keys(checkpoint, "state.json")
    hooks = [name for name in names if name.startswith(_HOOKS)]
    ranks = [name for name in checkpoint.manifest.files if name.startswith("rng/") and name.endswith(".json")]
    tensors = checkpoint.index.get("state", {})
    lines = [f"state       {', '.join(name for name in names if name not in hooks) or '-'}"]
    for number, name in enumerate(hooks or [""]):
        own = [entry for key, entry in tensors.items() if key.startswith(f"state.{name}.")] if name else []
        held = f" ({counted(len(own), 'tensor')}, {size(sum(map(stored_bytes, own)))})" if own else ""
        lines.append(f"{'hooks' if number == 0 else '':<12}{name.removeprefix(_HOOKS) or 'none has state'}{held}")
    held = ", ".join(_keys(checkpoint, ranks[0])) if ranks else "-"
    return [*lines, f"each rank   {held} ({counted(len(ranks), 'rank')})"]


def _keys(checkpoint: Checkpoint, path: str) -> list[str]:
    try:
        return list(json.loads((checkpoint.path / path).read_bytes()))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.path / path}: cannot be read ({error})") from error


def _tensor_rows(checkpoint: Checkpoint) -> list[tuple[int, tuple[str, ...]]]:
    """For each tensor its bytes, to sort by, and the cells of its line."""
    rows: list[tuple[int, tuple[str, ...]]] = []
    for section in checkpoint.sections():
        for name, entry in checkpoint.index[section].items():
            alias = f"same memory as {entry.alias}" if entry.alias else ""
            stored = stored_bytes(entry)
            rows.append((stored, (f"{section}/{name}", f"{_type(entry)} {list(entry.shape)}", size(stored), alias)))
    return rows


def stored_bytes(entry: TensorEntry) -> int:
    """What a tensor takes in the checkpoint: nothing, where it is another one's memory."""
    return 0 if entry.alias else prod(entry.shape) * saved_dtype(entry).itemsize


def _type(entry: TensorEntry) -> str:
    return str(saved_dtype(entry)).removeprefix("torch.")
