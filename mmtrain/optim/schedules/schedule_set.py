"""All schedules of a run: built from the config, applied to the optimizer's groups before every update."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from mmtrain.optim.schedules.composition import compose, overlapping
from mmtrain.optim.schedules.plateau import ReduceOnPlateau
from mmtrain.optim.schedules.schedule import Horizon, Schedule
from mmtrain.optim.wrapper_dict import OptimWrapperDict
from mmtrain.optim.wrappers import OptimWrapper
from mmtrain.registry import PARAM_SCHEDULERS, build, resolve
from mmtrain.source_lines import config_error
from mmtrain.suggest import did_you_mean

Group = dict[str, Any]


class ParamTrack:
    """One value, ``lr`` say, in all groups of one optimizer: its schedules and its values in the config."""

    def __init__(self, name: str, optim: OptimWrapper, schedules: Sequence[Schedule], horizon: Horizon) -> None:
        self.name = name
        self._optimizer = optim.optimizer
        self._base_group = optim.base_group
        self._schedules = schedules
        self._horizon = horizon
        groups = self.groups()
        self._in_betas = name == "momentum" and "momentum" not in groups[0] and "betas" in groups[0]
        self._in_tensor = not self._in_betas and any(isinstance(group.get(name), Tensor) for group in groups)
        self._check(schedules[0])
        self._compose()

    def _compose(self) -> None:
        """Compute the segments for the groups that there are now: a hook may add some later."""
        groups = self.groups()
        self._count = count = len(self._optimizer.param_groups)
        self.initial = [self._initial(group) for group in groups]
        self.plateaus: list[tuple[ReduceOnPlateau, list[float]]] = []
        for plateau in self._schedules:
            if isinstance(plateau, ReduceOnPlateau):
                bounds = plateau.bounds(count)
                self.plateaus.append((plateau, bounds + bounds[-1:] * (len(groups) - count)))
        timed = [schedule for schedule in self._schedules if not isinstance(schedule, ReduceOnPlateau)]
        self.segments = compose(timed, self._horizon, self.initial, groups=count)
        self._latest_first = self.segments[::-1]
        if len(self.segments) == 1 and not self.plateaus and self.segments[0].begun(0, 0):
            # The common case, without the checks below; this runs in every iteration.
            self.values = self.segments[0].values  # type: ignore[method-assign]

    @property
    def key(self) -> str:
        """The key of the groups that the schedules set."""
        return "betas" if self._in_betas else self.name

    def acts_on(self, optimizer: Optimizer) -> bool:
        """Whether the groups are those of ``optimizer``."""
        return self._optimizer is optimizer

    def groups(self) -> list[Group]:
        """The groups to which `values` belong; asked each time, because loading a state makes new ones."""
        return [*self._optimizer.param_groups, *([self._base_group] if self._base_group else [])]

    def _check(self, schedule: Schedule) -> None:
        for group in self.groups():
            if self.name not in group and not self._in_betas:
                keys = sorted(key for key in group if key != "params" and isinstance(group[key], int | float | Tensor))
                hint = did_you_mean(self.name, keys)
                schedule.refuse(f"the optimizer's groups have no {self.name!r}, only {', '.join(keys)}{hint}")

    def _initial(self, group: Group) -> float:
        """The value in the config, which stays in the group as ``initial_<name>``, MMEngine's key."""
        value = group["betas"][0] if self._in_betas else group[self.name]
        return float(group.setdefault(f"initial_{self.name}", float(value)))

    def values(self, iteration: int, epoch: int) -> list[float]:
        """The value of every group at a position; a pure function of it and of the plateaus' state."""
        values = self.initial
        for segment in self._latest_first:
            if segment.begun(iteration, epoch):
                values = segment.values(iteration, epoch)
                break
        for plateau, bounds in self.plateaus:
            if plateau.reductions:
                values = [plateau.reduced(value, bound) for value, bound in zip(values, bounds, strict=True)]
        return values

    def apply(self, iteration: int, epoch: int) -> None:
        if len(self._optimizer.param_groups) != self._count:
            self._compose()
        values = self.values(iteration, epoch)
        if self._in_betas or self._in_tensor:
            for group, value in zip(self.groups(), values, strict=False):
                self._put(group, value)
            return
        name = self.name
        for group, value in zip(self._optimizer.param_groups, values, strict=False):
            group[name] = value
        if self._base_group is not None:
            self._base_group[name] = values[-1]

    def _put(self, group: Group, value: float) -> None:
        if self._in_betas:
            group["betas"] = (value, *group["betas"][1:])
        elif isinstance(group[self.name], Tensor):
            # Filled, not replaced: a compiled or captured step holds on to it.
            group[self.name].fill_(value)
        else:
            group[self.name] = value


class ScheduleSet:
    """What every scheduled value is at any position of the run. No state but that of ReduceOnPlateau schedules.

    ``notices`` holds one sentence for each schedule that ends before the run, begins inside another or never acts.
    """

    def __init__(self, tracks: Sequence[ParamTrack] = (), notices: Sequence[str] = ()) -> None:
        self.tracks = list(tracks)
        self.notices = list(notices)
        self._plateaus = _named([plateau for track in self.tracks for plateau, _ in track.plateaus])
        self._apply = [track.apply for track in self.tracks]
        self._epoch = 0

    def apply(self, scheduled_iteration: int, epoch: int) -> None:
        """Set every group's values for the update that follows.

        ``scheduled_iteration``: iterations done, without those whose update was not applied (`Progress.scheduled`);
        ``epoch``: complete epochs.
        """
        self._epoch = epoch
        for apply in self._apply:
            apply(scheduled_iteration, epoch)

    def scheduled_keys(self, optimizer: Optimizer) -> frozenset[str]:
        """The keys of the optimizer's groups that schedules set (``lr``, ``betas``)."""
        return frozenset(track.key for track in self.tracks if track.acts_on(optimizer))

    def values(self, scheduled_iteration: int, epoch: int) -> list[dict[str, float]]:
        """What `apply` would set there, one dict for each group; for plots and plans. Nothing is changed."""
        rows: dict[int, dict[str, float]] = {}
        for track in self.tracks:
            for group, value in zip(track.groups(), track.values(scheduled_iteration, epoch), strict=False):
                rows.setdefault(id(group), {})[track.name] = value
        return list(rows.values())

    def observe(self, metrics: Mapping[str, Any], *, epoch: int | None = None) -> None:
        """Hand the metrics of a validation to the ReduceOnPlateau schedules; `apply` sets what follows from them.

        ``epoch`` is the number of complete epochs; by default that of the last `apply`. Raises RunError if a
        monitored metric is not among them.
        """
        for plateau in self._plateaus.values():
            plateau.observe(metrics, self._epoch if epoch is None else epoch)

    def state_dict(self) -> dict[str, Any]:
        """The counters of the ReduceOnPlateau schedules, by name; empty without them."""
        return {name: plateau.state_dict() for name, plateau in self._plateaus.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> list[str]:
        """Restore what `state_dict` gave, by name; returns one sentence for each one that has no counterpart."""
        saved, today = set(state_dict), set(self._plateaus)
        for name in saved & today:
            self._plateaus[name].load_state_dict(state_dict[name])
        gone = [f"{name}: not in today's config, its counters are dropped" for name in sorted(saved - today)]
        return gone + [f"{name}: not in the checkpoint, it starts afresh" for name in sorted(today - saved)]


def _named(plateaus: Sequence[ReduceOnPlateau]) -> dict[str, ReduceOnPlateau]:
    """Names that survive a change of the list around them: class, value and metric, numbered only among equals."""
    named: dict[str, ReduceOnPlateau] = {}
    for plateau in plateaus:
        name = stem = f"{type(plateau).__name__}.{plateau.param_name}.{plateau.monitor}"
        count = 1
        while name in named:
            count += 1
            name = f"{stem}.{count}"
        named[name] = plateau
    return named


def build_schedules(
    cfgs: Any,
    optim: OptimWrapper,
    *,
    max_iters: int | None = None,
    max_epochs: int | None = None,
    iterations_per_epoch: int | None = None,
    path: str = "param_scheduler",
) -> ScheduleSet:
    """Build the schedules of a run.

    ``cfgs``: None, one config or `Schedule`, a list of them, or (several optimizers) a dict of such lists by the
    optimizer's name; one list for several optimizers acts on each. The run's length is ``max_iters``, or ``max_epochs``
    times ``iterations_per_epoch``. Raises ConfigError for a schedule that cannot be placed in such a run.
    """
    horizon = Horizon(max_iters, max_epochs, iterations_per_epoch)
    if not isinstance(optim, OptimWrapperDict):
        return ScheduleSet(*_build_for(cfgs, optim, horizon, path))
    tracks: list[ParamTrack] = []
    notices: list[str] = []
    by_name = isinstance(cfgs, Mapping) and "type" not in cfgs
    if by_name and (unknown := sorted(set(cfgs) - set(optim.keys()))):
        raise config_error(f"{path}.{unknown[0]}", f"no such optimizer, expected {', '.join(optim.keys())}")
    for name, wrapper in optim.items():
        own = cfgs.get(name) if by_name else cfgs
        new_tracks, new_remarks = _build_for(own, wrapper, horizon, f"{path}.{name}" if by_name else path)
        tracks += new_tracks
        notices += new_remarks if by_name else [f"{name}: {notice}" for notice in new_remarks]
    return ScheduleSet(tracks, notices)


def _build_for(cfgs: Any, optim: OptimWrapper, horizon: Horizon, path: str) -> tuple[list[ParamTrack], list[str]]:
    """The tracks and notices of one optimizer."""
    notices: list[str] = []
    by_value: dict[str, list[Schedule]] = {}
    for schedule in _build_list(cfgs, horizon, path):
        if notice := _never_takes_effect(schedule, horizon):
            notices.append(notice)
        else:
            by_value.setdefault(schedule.param_name, []).append(schedule)
    tracks = [ParamTrack(name, optim, schedules, horizon) for name, schedules in by_value.items()]
    for track in tracks:
        notices += _segment_notices(track, by_value[track.name], horizon)
    return tracks, notices


def _build_list(cfgs: Any, horizon: Horizon, path: str) -> list[Schedule]:
    if cfgs is None:
        return []
    listed = isinstance(cfgs, Sequence)
    schedules = []
    for index, cfg in enumerate(cfgs if listed else [cfgs]):
        where = f"{path}[{index}]" if listed else path
        if isinstance(cfg, Mapping):
            if "type" not in cfg:
                raise config_error(where, "'type' is missing, expected the name of one such as 'CosineAnnealingLR'")
            _check_kind(resolve(PARAM_SCHEDULERS, cfg["type"], path=f"{where}.type"), where)
        schedule = build(PARAM_SCHEDULERS, cfg, path=where)
        _check_kind(type(schedule), where)
        schedule.place(horizon, where)
        schedules.append(schedule)
    return schedules


def _check_kind(cls: Callable[..., Any], path: str) -> None:
    if isinstance(cls, type) and issubclass(cls, Schedule):
        return
    name = getattr(cls, "__name__", str(cls))
    if any(base.__name__ == "_ParamScheduler" for base in getattr(cls, "__mro__", ())):
        raise config_error(
            path,
            f"{name} is a scheduler of MMEngine's kind, which steps from one value to the next; here a value is a "
            "function of the position: derive from mmtrain.optim.Schedule and give multiple(t)",
        )
    raise config_error(path, f"{name} is not a schedule; expected a subclass of mmtrain.optim.Schedule")


def _never_takes_effect(schedule: Schedule, horizon: Horizon) -> str | None:
    if isinstance(schedule, ReduceOnPlateau):
        return None
    name = f"{schedule.path} {type(schedule).__name__}"
    begin, _ = schedule.span(horizon)
    if horizon.iterations is not None and begin >= horizon.iterations:
        return f"{name} (begin={begin}) never takes effect: the run ends at iteration {horizon.iterations}"
    return None if schedule.length else f"{name} never takes effect: it covers less than one iteration"


def _segment_notices(track: ParamTrack, schedules: Sequence[Schedule], horizon: Horizon) -> list[str]:
    """Overlaps, and an end before the run's, of the schedules of one value."""
    notices = []
    timed = [schedule for schedule in schedules if not isinstance(schedule, ReduceOnPlateau)]
    for members in overlapping(timed, horizon):
        first, *others = sorted(members, key=lambda one: one.span(horizon)[0])
        for other in others:
            (begin, end), inside = other.span(horizon), first.span(horizon)
            notices.append(
                f"{other.path} {type(other).__name__} begins at iteration {begin}, inside {first.path} "
                f"{type(first).__name__} ({inside[0]} to {inside[1]}): both act on the {track.name}"
            )
            if end > inside[1]:
                first = other
    run = horizon.iterations
    if timed and run is not None:
        last = max(timed, key=lambda one: one.span(horizon)[1])
        end = last.span(horizon)[1]
        if end < run:
            value = track.segments[-1].exit[-1]
            notices.append(
                f"{last.path} {type(last).__name__} ends at iteration {end} of {run}: "
                f"the {track.name} stays at {value:g} after it"
            )
    return notices
