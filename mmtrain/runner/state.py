"""The named table of everything that is saved, in the order in which it is restored."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mmtrain import model_state, randomness
from mmtrain.dtensor import full_state
from mmtrain.errors import CheckpointError, MMTrainError
from mmtrain.launch import is_lost_connection
from mmtrain.printable import printable
from mmtrain.runner.best import BestRecords
from mmtrain.runner.run import Run
from mmtrain.types import Stateful

OPTIMIZER_KEYS = ("optimizer", "param_groups")
"""The optimizer's entries in state.json besides its tensors: restored with these, before the table."""


def small_state_table(run: Run, best: BestRecords) -> dict[str, Stateful]:
    """Name to object, for everything but the model, the optimizer's tensors and the generators.

    ``progress`` comes first, because the others may want to know the position when they are restored.
    """
    table: dict[str, Stateful] = {"progress": run.progress, "log": run.scalars}
    if run.optim_wrapper is not None:
        table["scaler"] = run.optim_wrapper
    if run.schedules is not None:
        table["schedules"] = run.schedules
    if best.metrics or best.records:
        table["best"] = best
    for name, hook in run.hooks.named.items():
        if isinstance(hook, Stateful):
            table[getattr(hook, "state_name", f"hooks.{name}")] = hook
    for name, metric in _metrics(run):
        if isinstance(metric, Stateful):
            table[f"metrics.{name}"] = metric
    return table


def _metrics(run: Run) -> Iterator[tuple[str, Any]]:
    """The metrics of validation, by set, class and index: ``val.Recall_0``."""
    for name, (_, evaluator) in run.val_sets.items():
        for index, metric in enumerate(getattr(evaluator, "metrics", ())):
            yield f"{name or 'val'}.{type(metric).__name__}_{index}", metric


def capture_small_state(run: Run, best: BestRecords) -> dict[str, Any]:
    """The state of everything in the table, by name."""
    state = {name: item.state_dict() for name, item in small_state_table(run, best).items()}
    model = model_state.others_of(run.model)
    if model:
        state["model"] = model
    switches = run.switches.state_dict()
    if switches:
        state["switches"] = switches
    return full_state(state) if run.strategy.forward_is_collective else state


def saved_model_entries(saved: Mapping[str, Any]) -> dict[str, Any]:
    """What a small state holds of the model: the entries of its state that are not plain tensors, by name."""
    extras = saved.get("modules", {})  # earlier versions: the extra states alone, by the names of their modules
    entries = {f"{name}._extra_state".removeprefix("."): value for name, value in extras.items()}
    return entries | saved.get("model", {})


def capture_model(run: Run, *, left_out: Collection[str] = ()) -> dict[str, Tensor]:
    """The model's tensors, but for those named in ``left_out``; they share memory with the run."""
    return {name: value for name, value in run.strategy.model_state().items() if name not in left_out}


def capture_rank_state(run: Run) -> dict[str, Any]:
    """What every rank has of its own: the states of its generators, and what its data stream must remember.

    Modules may hold more than buffers, such as a metric's counts, which no one shares over ranks: what ranks other than
    0 hold is here too.
    """
    assert run.train_dataloader is not None
    state = {"generators": randomness.capture(), "data": run.train_dataloader.state_dict()}
    own = model_state.own_entries(run.model) if run.world_size > 1 else {}  # on every rank: it may be a collective
    return {**state, "model": own} if own and run.rank > 0 else state


@dataclass
class StateReport:
    """What a resume did: names that were restored, that the checkpoint lacks, and that this run does not use."""

    restored: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """One line for each kind that has any entry."""
        kinds = {"restored": self.restored, "not in the checkpoint": self.absent, "not used by this run": self.unused}
        return [printable(f"{kind}: {', '.join(names)}") for kind, names in kinds.items() if names] + self.notices


@contextmanager
def restoring(what: str) -> Iterator[None]:
    """Raise CheckpointError, which names what could not be restored, for an error inside.

    Either the class changed what it saves, or the checkpoint was not written by it.
    """
    try:
        yield
    except MMTrainError:
        raise
    except Exception as error:
        if is_lost_connection(error):
            raise
        raise CheckpointError(
            f"the state of {what} in this checkpoint cannot be restored ({type(error).__name__}: {error}); was its "
            "class changed since? Run again with --debug for the traceback, or continue from the weights alone: "
            "resume=False, load_from=<checkpoint>"
        ) from error


def restore_small_state(run: Run, best: BestRecords, saved: Mapping[str, Any]) -> StateReport:
    """Restore what `capture_small_state` gave.

    A hook that is new, or gone, since the checkpoint was written is reported and keeps, or loses, its state.
    Raises CheckpointError when the position itself is missing.
    """
    if "progress" not in saved:
        raise CheckpointError("the checkpoint's state.json has no 'progress', so the position of its run is unknown")
    report = StateReport()
    table = small_state_table(run, best)
    state = _with_current_names(saved, table)
    for name, item in table.items():
        if name in state:
            with restoring(name):
                notices = item.load_state_dict(state[name])
            if isinstance(notices, list):  # schedules report what did not fit
                report.notices += notices
            report.restored.append(name)
        else:
            report.absent.append(name)
    with restoring("the model's switches"):
        run.switches.load_state_dict(state.get("switches", {}))
    elsewhere = ("extra", "model", "modules", "switches", *OPTIMIZER_KEYS)  # taken by others
    report.unused = [name for name in state if name not in table and name not in elsewhere]
    return report


def _with_current_names(saved: Mapping[str, Any], table: Mapping[str, Stateful]) -> dict[str, Any]:
    """The saved state by today's names: the best records were once the state of CheckpointHook."""
    state = dict(saved)
    for name, value in saved.items():
        was_hook = name.startswith("hooks.") and name not in table
        if was_hook and isinstance(value, Mapping) and set(value) <= {"best", "rules"} and "best" in value:
            del state[name]
            if "best" in table:
                state["best"] = value
    return state
