"""``checkpoint show``: what a checkpoint contains."""

import argparse
from collections import Counter
from math import prod

from mmtrain.checkpoint import Checkpoint, Manifest
from mmtrain.checkpoint.foreign import deepspeed_files
from mmtrain.checkpoint.format import check
from mmtrain.checkpoint.format.index import TensorEntry
from mmtrain.checkpoint.format.structure import read_file
from mmtrain.checkpoint.reader import saved_dtype
from mmtrain.cli.checkpoint.find import find_checkpoint
from mmtrain.cli.checkpoint.text import counted, echo, size, table, when
from mmtrain.errors import CheckpointError

_LARGEST = 5
_HOOKS = "hooks."


def show(arguments: argparse.Namespace) -> int:
    """Print the position of the run, what wrote the checkpoint, and what it contains."""
    checkpoint = find_checkpoint(arguments.checkpoint)
    if arguments.config:
        echo(checkpoint.manifest.config, end="")
        return 0
    lines = [str(checkpoint.path), *table(_facts(checkpoint.manifest), indent="  ")]
    rows = _tensor_rows(checkpoint)
    if rows:
        lines += ["", *table(_sections(checkpoint), right=(1, 2), indent="  ")]
    lines += ["", *_states(checkpoint), ""]
    if not rows:  # an engine's files, whose tensors are only known once they are loaded
        echo("\n".join(lines[:-1]))
        return 0
    title = "tensors"
    if not arguments.tensors:
        title = f"largest tensors (of {len(rows)}; --tensors lists all)"
        rows = sorted(rows, key=lambda row: -row[0])[:_LARGEST]
    lines += [title, *table([cells for _, cells in rows], right=(2,), indent="  ")]
    echo("\n".join(lines))
    return 0


def _facts(manifest: Manifest) -> list[tuple[str, str]]:
    position, meta = manifest.position, manifest.meta
    of = f" of {meta['samples_per_epoch']:,}" if meta.get("samples_per_epoch") else ""
    lengths = {"epochs": meta.get("max_epochs"), "iterations": meta.get("max_iters")}
    ends = " or ".join(f"{length:,} {unit}" for unit, length in lengths.items() if length)
    epochs = counted(manifest.epoch, "epoch")
    windows = counted(meta.get("accumulative_counts", 1), "iteration")
    unsaved = "" if meta.get("has_optimizer", True) else " (state not saved)"
    temporary = ", temporary: deleted once there is a newer one" if manifest.temporary else ""
    parts = f", split over {len(manifest.parts)} disks" if manifest.parts else ""
    facts = [
        ("position", f"iteration {manifest.iteration:,}, update {position.get('update', 0):,}"),
        ("data", f"{epochs} completed, {position.get('offset', 0):,}{of} samples of the next"),
        ("dataset", manifest.data_fingerprint or "-"),
        ("run", f"{meta.get('experiment_name') or '-'}{f', {ends} in total' if ends else ''}"),
        ("saved", when(manifest.created) + temporary),
        ("seed", str(manifest.seed)),
        ("world", f"{counted(manifest.world_size, 'process', 'processes')}, {manifest.strategy}"),
        ("batch", f"{meta.get('batch_size') or '?'} per process, {windows} per update"),
        ("optimizer", f"{meta.get('optimizer') or '-'}{unsaved}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in manifest.versions.items()) or "-"),
        ("on disk", f"{size(manifest.bytes)} in {counted(len(manifest.files), 'file')}{parts}"),
    ]
    native = meta.get("native")
    if native is not None:
        sizes = [record.size for path, record in manifest.files.items() if deepspeed_files.is_state_file(path)]
        facts.append((
            "engine",
            f"DeepSpeed {native['version']}, ZeRO stage {native['stage']}, {native['dtype']}: weights and optimizer "
            f"state in {counted(len(sizes), 'DeepSpeed file')}, {size(sum(sizes))}",
        ))  # fmt: skip
    if not manifest.has_frozen:
        facts.append((
            "frozen",
            "parameters not saved (save_frozen=False or exclude_frozen_parameters=True); a resume takes them from "
            "the new model or load_from",
        ))  # fmt: skip
    return facts


def _sections(checkpoint: Checkpoint) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("section", "tensors", "size", "types")]
    for section in checkpoint.sections():
        entries = checkpoint.index[section].values()
        types = Counter(_type(entry) for entry in entries)
        text = ", ".join(name if len(types) == 1 else f"{name} x {count}" for name, count in types.most_common())
        rows.append((section, f"{len(entries):,}", size(sum(map(stored_bytes, entries))), text))
    return rows


def _states(checkpoint: Checkpoint) -> list[str]:
    """The names of the state. Values are not read: weight averages may be as large as the model."""
    names = _keys(checkpoint, "state.json")
    hooks = [name for name in names if name.startswith(_HOOKS)]
    ranks = [name for name in checkpoint.manifest.files if name.startswith("rng/") and name.endswith(".json")]
    tensors = checkpoint.index.get("state", {})
    lines = [f"state       {', '.join(name for name in names if name not in hooks) or '-'}"]
    for number, name in enumerate(hooks or [""]):
        held = [entry for key, entry in tensors.items() if key.startswith(f"state.{name}.")] if name else []
        text = f" ({counted(len(held), 'tensor')}, {size(sum(map(stored_bytes, held)))})" if held else ""
        lines.append(f"{'hooks' if number == 0 else '':<12}{name.removeprefix(_HOOKS) or 'none with state'}{text}")
    of_a_rank = ", ".join(_keys(checkpoint, ranks[0])) if ranks else "-"
    return [*lines, f"per rank    {of_a_rank} ({counted(len(ranks), 'rank')})"]


def _keys(checkpoint: Checkpoint, name: str) -> list[str]:
    path = checkpoint.path / name
    document = check.parse(read_file(path), str(path))
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: expected the state by name, found a {type(document).__name__}")
    return list(document)


def _tensor_rows(checkpoint: Checkpoint) -> list[tuple[int, tuple[str, ...]]]:
    """For each tensor its size in bytes, to sort by, and the cells of its line."""
    rows: list[tuple[int, tuple[str, ...]]] = []
    for section in checkpoint.sections():
        for name, entry in checkpoint.index[section].items():
            alias = f"shares memory with {entry.alias}" if entry.alias else ""
            stored = stored_bytes(entry)
            rows.append((stored, (f"{section}/{name}", f"{_type(entry)} {list(entry.shape)}", size(stored), alias)))
    return rows


def stored_bytes(entry: TensorEntry) -> int:
    """Bytes of a tensor in the checkpoint; 0 if it shares the memory of another tensor."""
    return 0 if entry.alias else prod(entry.shape) * saved_dtype(entry).itemsize


def _type(entry: TensorEntry) -> str:
    return str(saved_dtype(entry)).removeprefix("torch.")
