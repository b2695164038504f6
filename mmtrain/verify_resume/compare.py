"""Compares what two runs left behind, bit for bit, and names likely causes of a difference."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtrain.checkpoint import Checkpoint, CheckpointStore
from mmtrain.checkpoint.compare import (
    ABSENT,
    MEASURED,
    ComparedGroup,
    Difference,
    compare_checkpoints,
    difference,
    first_difference,
    ignored,
)
from mmtrain.errors import RunError
from mmtrain.verify_resume.runs import FinishedRun

_POSITION = ("mode", "step", "iter", "epoch")  # where a line belongs, not what was measured there
_NAMES = ("the undisturbed run", "the killed run")
Logged = dict[tuple[int, str], dict[str, Any]]


@dataclass
class RunComparison:
    """The groups that were compared, the first difference, and the iteration at which the logs first differ."""

    groups: list[ComparedGroup]
    first: Difference | None
    iteration: int | None = None


def compare_runs(undisturbed: FinishedRun, killed: FinishedRun, *, ignore: Iterable[str] = ()) -> RunComparison:
    """Compare every logged value except measured ones, and the last checkpoints.

    Raises RunError if a run left no good checkpoint, or logged an iteration twice.
    """
    ignore = list(ignore)
    logs, first, iteration = compare_logs(read_logs(undisturbed.work_dir), read_logs(killed.work_dir), ignore)
    a, b = (_last_checkpoint(run.work_dir) for run in (undisturbed, killed))
    found = compare_checkpoints(a, b, ignore=ignore, names=_NAMES)
    if a.name != b.name:
        ends = ComparedGroup("last checkpoint")
        ends.add("last checkpoint", f"{a.name} != {b.name}")
        found.insert(0, ends)
    return RunComparison([*logs, *found], first or first_difference(found), iteration)


def _last_checkpoint(work_dir: Path) -> Checkpoint:
    checkpoint, problems = CheckpointStore(work_dir).newest_good()
    if checkpoint is None or problems:
        found = "; ".join(map(str, problems)) or "there is none"
        raise RunError(f"the last checkpoint in {work_dir} is missing or damaged: {found}")
    return checkpoint


def read_logs(work_dir: Path) -> Logged:
    """Read the logged lines of all starts in a work dir, by iteration and mode (``train``, ``val``).

    Raises RunError for a line that was logged twice: a resume must cut the log at the position where it continues.
    """
    found: Logged = {}
    for path in sorted(work_dir.glob("*/vis_data/scalars.json")):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            key = (int(record["step"]), str(record["mode"]))
            if key[1] == "save":  # times of a save
                continue
            if key in found:
                raise RunError(f"{path}: the {key[1]} line of iteration {key[0]} was logged twice")
            found[key] = record
    return found


def compare_logs(
    a: Logged, b: Logged, ignore: Sequence[str]
) -> tuple[list[ComparedGroup], Difference | None, int | None]:
    """Return a group for each logged name, the first difference in the order of iterations, and its iteration."""
    groups: dict[str, ComparedGroup] = {}
    first, iteration = None, None
    for key in sorted({*a, *b}, key=lambda key: (key[0], key[1] != "train")):
        ours, theirs = a.get(key, {}), b.get(key, {})
        names = dict.fromkeys([*ours, *theirs])
        for name in sorted(names, key=lambda name: name != "loss"):
            if name in _POSITION or ignored([name], [*MEASURED, *ignore]):
                continue
            title = name if key[1] == "train" else f"{key[1]} {name}"
            group = groups.setdefault(title, ComparedGroup(title))
            how = difference(ours.get(name, ABSENT), theirs.get(name, ABSENT), _NAMES)
            group.add(f"{title} at iteration {key[0]}", how)
            if how and first is None:
                first, iteration = group.differences[0], key[0]
    return list(groups.values()), first, iteration


# ---- causes -------------------------------------------------------------------------------------------------------
_UNSEEDED = (
    "something that no seed controls: random.Random() or np.random.default_rng() without a seed, the clock, the "
    "iteration order of a set of strings, threads, the network"
)
_KERNELS = (
    "GPU kernels that sum in a different order every time: try --cfg-options randomness.deterministic=True, which "
    "selects deterministic kernels"
)
_DATA = (
    "the dataset, its transforms or the collate function keep state between samples (a counter, a cache, a generator): "
    "make dataset[i] depend only on i and on the default generators of torch, numpy and random, or give an iterable "
    "dataset state_dict and load_state_dict"
)
_MODEL = "the model keeps state in a plain attribute: make it a buffer, so that it is saved with the weights"
_HOOK = "a hook keeps state that training or the log uses: give the hook state_dict and load_state_dict"


def likely_causes(
    comparison: RunComparison, killed: FinishedRun, facts: Mapping[str, Any], *, reproducible: bool
) -> list[str]:
    """What may have caused a difference, most likely first.

    ``facts`` is what `ResumeTrialHook` recorded of a start; ``reproducible`` is whether a second undisturbed run gave
    the same result as the first.
    """
    kernels = [_KERNELS] if facts.get("device") != "cpu" and not facts.get("deterministic") else []
    if not reproducible:
        return [*kernels, _UNSEEDED]
    differing = [group.name for group in comparison.groups if group.differences]
    states = [name for name in differing if name.startswith("state hooks.")]
    if differing == states:
        names = ", ".join(name.removeprefix("state hooks.") for name in states)
        return [f"the load_state_dict of hook {names} does not restore everything, or the hook counts its restarts"]
    causes = []
    if not facts.get("positional", True) or not facts.get("per_sample", True):
        causes.append("randomness.positional or randomness.per_sample is switched off in the config")
    trained = any(name.endswith(" tensors") for name in differing)
    if trained:
        causes += [_DATA, _MODEL, _HOOK]
    else:
        causes += [_DATA if "state of ranks" in differing else _HOOK]
    first_resume = min(killed.resumed_at, default=0)
    if trained and comparison.iteration is not None and comparison.iteration > first_resume + 1:
        causes.append("save_optimizer=False or save_param_scheduler=False in default_hooks.checkpoint")
    return causes + kernels
