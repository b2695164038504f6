"""Reports what changed while a run trained and no checkpoint holds, so that "exact" is a checked claim.

Everything that a resume needs is either a function of the position or in the checkpoint. What the user's own modules,
hooks and data sets keep beside it is compared once: when training starts, after the first iteration, and before the
first save. A value that appears in the first iteration and then stays as it is counts as a cache, and a reading of a
clock is none of a run's state.
"""

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from torch import nn

from mmtrain import dist, model_state
from mmtrain.printable import listed
from mmtrain.runner.run import Run
from mmtrain.types import Stateful
from mmtrain.value_marks import LARGEST_OF_DATA, Marks, Walk, changed_state, clocks

_SHOWN = 10
_OF_TORCH = frozenset(vars(nn.Module())) | {"_is_full_backward_hook", "_compiled_call_impl"}
_BY_ENGINES = ("ds_", "_ds_", "applied_pre_backward_ref_cnt", "_fsdp")  # attributes that engines add to modules
_GENERATOR = "draw from torch's, numpy's or random's global generators, which are seeded from the position"
_REMEDIES = {
    "buffer": "register them with persistent=True",
    "model": "make them buffers (register_buffer), or return them from get_extra_state() and take them back in "
    "set_extra_state()",
    "hook": "give the hook state_dict() and load_state_dict()",
    "data": "compute them from the index of the sample, or keep them in a hook with state_dict() and load_state_dict()",
}


class _Found(NamedTuple):
    kind: str
    marks: Marks
    generators: set[str]


class UnsavedState:
    """Compares what the user's objects keep; rank 0 does so for all, and nothing is done after the report."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._is_on = dist.is_main()
        self._clocks = clocks()
        self._start: dict[str, Marks] = {}
        self._first: dict[str, Marks] | None = None
        self._workers_have_reported = False

    def begin(self) -> None:
        """Note how training starts."""
        if self._is_on:
            self._clocks = clocks()
            self._start = self._marks()

    def settle(self) -> None:
        """Note how things are after the first iteration."""
        if self._is_on:
            self._first = self._marks()

    def report(self) -> list[str]:
        """Before a save: a line for each kind of owner whose values have changed since the start; later none.

        Before a second iteration it waits for the next save: until then a cache cannot be told from state.
        """
        if not self._is_on or self._first is None:
            return []
        lines = self._in_workers()
        if self._start:
            keepers = {f"model {name}" for name in self._with_entries_of_their_own()}
            for owner, found in self._collect():
                if owner in keepers:
                    continue
                before = self._start.get(owner, {}), self._first.get(owner, {})
                names = changed_state(*before, found.marks, self._clocks)
                lines += _lines(owner, found.kind, names, found.generators)
            self._start = {}
        return lines

    def _in_workers(self) -> list[str]:
        """What data workers found in their copies of the data set; they may need a few batches."""
        watch = getattr(self._run.train_dataloader, "watch", None)
        names, generators = watch.found() if watch is not None and not self._workers_have_reported else ([], [])
        if watch is not None and names:
            self._workers_have_reported = True
            watch.stop()
        return _lines("train_dataloader", "data", names, generators)

    def _with_entries_of_their_own(self) -> set[str]:
        """The modules that add something to the state besides parameters and buffers: they save what they need."""
        if dist.world_size() > 1:  # collecting a state may be a collective; then it is taken for granted
            return {name for name, module in self._run.model.named_modules() if _has_own_state(module)}
        return {name.rpartition(".")[0] for name in model_state.own_entries(self._run.model)}

    def _marks(self) -> dict[str, Marks]:
        return {owner: found.marks for owner, found in self._collect()}

    def _collect(self) -> Iterator[tuple[str, _Found]]:
        run = self._run
        walk = Walk()
        for name, module in run.model.named_modules():
            _mark_buffers(walk, module, name)
        yield "model (buffers with persistent=False)", _Found("buffer", walk.marks, walk.generators)
        walk = Walk()
        for name, module in run.model.named_modules():
            own = Walk() if _has_own_state(module) else walk
            engine = {key for key in vars(module) if key.startswith(_BY_ENGINES)}
            own.attributes(module, name if own is walk else "", ignored=_OF_TORCH | engine)
            if own is not walk:
                yield f"model {name}", _Found("model", own.marks, own.generators)
        yield "model", _Found("model", walk.marks, walk.generators)
        for name, hook in run.hooks.named.items():
            if _is_users(hook) and not isinstance(hook, Stateful) and hasattr(hook, "__dict__"):
                walk = Walk()
                walk.attributes(hook, "")
                yield f"hook {name}", _Found("hook", walk.marks, walk.generators)
        dataset = getattr(run.train_dataloader, "dataset", None)
        if dataset is not None and not isinstance(dataset, Stateful):
            walk = Walk(LARGEST_OF_DATA)
            walk.value(dataset, "dataset")
            yield "train_dataloader", _Found("data", walk.marks, walk.generators)


def _mark_buffers(walk: Walk, module: nn.Module, name: str) -> None:
    for last in sorted(module._non_persistent_buffers_set):
        buffer = module._buffers.get(last)
        if buffer is not None:
            walk.value(buffer, f"{name}.{last}" if name else last)


def _has_own_state(module: nn.Module) -> bool:
    """Whether a module may save what it likes; if it does, what is missing there cannot be known."""
    kind, plain = type(module), nn.Module
    return (
        kind.get_extra_state is not plain.get_extra_state
        or kind._save_to_state_dict is not plain._save_to_state_dict
        or kind.state_dict is not plain.state_dict
    )


def _is_users(hook: Any) -> bool:
    return type(hook).__module__.partition(".")[0] not in ("mmtrain", "mmengine")


def _lines(owner: str, kind: str, names: list[str], generators: Collection[str]) -> list[str]:
    """A line for the generators among ``names`` and one for the others, where there are any."""
    groups = {
        _REMEDIES[kind]: [name for name in names if name not in generators],
        _GENERATOR: [name for name in names if name in generators],
    }
    return [
        f"{owner}: {listed(group, _SHOWN)} changed while training and are in no checkpoint. If training depends on "
        f"them, a resume is not exact: {remedy}."
        for remedy, group in groups.items()
        if group
    ]
