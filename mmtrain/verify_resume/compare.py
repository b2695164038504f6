"""What two runs left behind, compared bit by bit; and the likely causes of a difference."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtrain.checkpoint import CheckpointStore
from mmtrain.cli.checkpoint.compare import (
    ABSENT,
    MEASURED,
    Difference,
    Group,
    compare_checkpoints,
    difference,
    first_difference,
    ignored,
)
from mmtrain.errors import RunError
from mmtrain.verify_resume.runs import Run

_PLACE = ("mode", "step", "iter", "epoch")
_NAMES = ("the undisturbed run", "the killed run")
Logged = dict[tuple[int, str], dict[str, Any]]


@dataclass
class Outcome:
    """All groups that were compared, the first thing that differs, and the iteration where the logs first differ."""

    groups: list[Group]
    first: Difference | None
    iteration: int | None = None


def compare_runs(whole: Run, killed: Run, *, ignore: Iterable[str] = ()) -> Outcome:
    """Compare every logged value but measured ones, and all of the last checkpoints.

    Raises RunError where a run left nothing to compare.
    """
    ignore = list(ignore)
    logs, first, iteration = compare_logs(read_logs(whole.work_dir), read_logs(killed.work_dir), ignore)
    a, b = (_last(run.work_dir) for run in (whole, killed))
    found = compare_checkpoints(a, b, ignore=ignore, names=_NAMES)
    if a.name != b.name:
        ends = Group("last checkpoint", 1, [Difference("last checkpoint", f"{a.name} != {b.name}")])
        found.insert(0, ends)
    return Outcome([*logs, *found], first or first_difference(found), iteration)


def _last(work_dir: Path) -> Any:
    checkpoint, problems = CheckpointStore(work_dir).newest_good()
    if checkpoint is None or problems:
        raise RunError(f"the run in {work_dir} left no good last checkpoint: {'; '.join(map(str, problems)) or 'none'}")
    return checkpoint


def read_logs(work_dir: Path) -> Logged:
    """Every logged line of all starts in a work dir, by iteration and kind (train, val).

    Raises RunError for a line that is there twice: a resume has to cut what it does again.
    """
    found: Logged = {}
    for path in sorted(work_dir.glob("*/vis_data/scalars.json")):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            place = (int(record["step"]), str(record["mode"]))
            if place[1] == "save":  # what a save cost
                continue
            if place in found:
                raise RunError(f"{path}: the {place[1]} line of iteration {place[0]} is logged twice")
            found[place] = record
    return found


def compare_logs(a: Logged, b: Logged, ignore: Sequence[str]) -> tuple[list[Group], Difference | None, int | None]:
    """A group for each logged name, the first difference in the order of iterations, and its iteration."""
    groups: dict[str, Group] = {}
    first, iteration = None, None
    for place in sorted({*a, *b}, key=lambda place: (place[0], place[1] != "train")):
        ours, theirs = a.get(place, {}), b.get(place, {})
        names = dict.fromkeys([*ours, *theirs])
        for name in sorted(names, key=lambda name: name != "loss"):
            if name in _PLACE or ignored([name], [*MEASURED, *ignore]):
                continue
            title = name if place[1] == "train" else f"{place[1]} {name}"
            group = groups.setdefault(title, Group(title))
            group.compared += 1
            how = difference(ours.get(name, ABSENT), theirs.get(name, ABSENT), _NAMES)
            if how:
                group.differences.append(Difference(f"{title} at iteration {place[0]}", how))
                if first is None:
                    first, iteration = group.differences[0], place[0]
    return list(groups.values()), first, iteration


# ---- causes -------------------------------------------------------------------------------------------------------
_UNSEEDED = (
    "something that no seed reaches: random.Random() or np.random.default_rng() without a seed, the clock, the order "
    "of a set of strings, threads, the network"
)
_KERNELS = (
    "GPU kernels that add in any order: try --cfg-options randomness.deterministic=True, which makes them add in one"
)
_DATA = (
    "the data set, its transforms or the collate function keep something between samples (a counter, a cache, a "
    "generator of their own): let dataset[i] depend on i and on the default generators of torch, numpy and random "
    "alone, or, for an iterable data set, give it state_dict and load_state_dict"
)
_MODEL = "the model keeps something in a plain attribute: make it a buffer, so that it is saved with the weights"
_HOOK = "a hook keeps something that training or the log uses: give it state_dict and load_state_dict"


def likely_causes(outcome: Outcome, killed: Run, facts: Mapping[str, Any], *, reproducible: bool) -> list[str]:
    """What may be behind a difference, most likely first.

    ``facts`` is what a start noted of the run, ``reproducible`` whether a second undisturbed run was like the first.
    """
    kernels = [_KERNELS] if facts.get("device") != "cpu" and not facts.get("deterministic") else []
    if not reproducible:
        return [*kernels, _UNSEEDED]
    differing = [group.name for group in outcome.groups if group.differences]
    states = [name for name in differing if name.startswith("state hooks.")]
    if differing == states:
        names = ", ".join(name.removeprefix("state hooks.") for name in states)
        return [f"the hook {names} does not put back everything in load_state_dict, or counts its own restarts"]
    causes = []
    if not facts.get("positional", True) or not facts.get("per_sample", True):
        causes.append("randomness.positional or randomness.per_sample is switched off in the config")
    trained = any(name.endswith(" tensors") for name in differing)
    if trained:
        causes += [_DATA, _MODEL, _HOOK]
    else:
        causes += [_DATA if "state of ranks" in differing else _HOOK]
    if trained and outcome.iteration is not None and outcome.iteration > min(killed.resumed_at, default=0) + 1:
        causes.append("save_optimizer=False or save_param_scheduler=False in default_hooks.checkpoint")
    return causes + kernels
