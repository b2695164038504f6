"""How the schedules of one group value act together.

MMEngine's schedules multiply the *current* value, each in its own span, so that a list of them composes. Written as
closed forms that is:

* **in sequence** (spans that do not overlap): each one acts on the value that the one before it left;
* **overlapping, all of them plain multiples** (an iteration-based warm-up inside an epoch-based step decay): their
  multiples are multiplied;
* **overlapping, one of them with a floor** (a warm-up inside a cosine with ``eta_min``): the floor itself is then
  multiplied along the way, and the result has no closed form. The overlap is stepped through as MMEngine does, once,
  and remembered; the cost is bounded by the length of the overlap and none of it depends on the run's history.

A `ScheduleSegment` is a maximal set of overlapping schedules; segments follow one another in time.
"""

from collections.abc import Sequence

from mmtrain.optim.schedules.schedule import Horizon, Schedule


class ScheduleSegment:
    """One schedule alone. ``entry`` is each group's value where it begins, ``bases`` the values in the config."""

    def __init__(self, schedule: Schedule, entry: Sequence[float], bases: Sequence[float]) -> None:
        self._start = schedule.start
        self._last = schedule.length - 1
        self._by_epoch = schedule.epoch_unit
        self._multiple = schedule.multiple
        self._source = None if schedule.keeps_source else schedule.source
        self._parts = [(schedule.floor(base), value, base) for base, value in zip(bases, entry, strict=True)]
        self.exit = self._at(self._last)

    def begun(self, iteration: int, epoch: int) -> bool:
        return (epoch if self._by_epoch else iteration) >= self._start

    def values(self, iteration: int, epoch: int) -> list[float]:
        """The value of every group; ``begun`` holds."""
        t = (epoch if self._by_epoch else iteration) - self._start
        return self._at(t) if t < self._last else self.exit

    def _at(self, t: int) -> list[float]:
        multiple, source = self._multiple(t), self._source
        if source is None:
            return [floor + (entry - floor) * multiple for floor, entry, _ in self._parts]
        return [floor + (source(t, entry, base) - floor) * multiple for floor, entry, base in self._parts]


class ProductSegment:
    """Overlapping schedules that are all plain multiples of what they find."""

    def __init__(self, schedules: Sequence[Schedule], entry: Sequence[float]) -> None:
        self._schedules = list(schedules)
        self._entry = list(entry)
        self.exit = self._scaled([schedule.length - 1 for schedule in self._schedules])

    def begun(self, iteration: int, epoch: int) -> bool:
        return any((epoch if s.epoch_unit else iteration) >= s.start for s in self._schedules)

    def values(self, iteration: int, epoch: int) -> list[float]:
        return self._scaled([(epoch if s.epoch_unit else iteration) - s.start for s in self._schedules])

    def _scaled(self, steps: Sequence[int]) -> list[float]:
        product = 1.0
        for schedule, t in zip(self._schedules, steps, strict=True):
            if t >= 0:
                product *= schedule.multiple(min(t, schedule.length - 1))
        return [value * product for value in self._entry]


class SteppedSegment:
    """Overlapping schedules of which at least one has a floor, in MMEngine's recursive form.

    A function of the iteration alone: epochs are taken to end every ``iterations_per_epoch``. ``bases`` holds, for each
    schedule, the values of the groups in the config.
    """

    def __init__(
        self, schedules: Sequence[Schedule], horizon: Horizon, entry: Sequence[float], bases: Sequence[Sequence[float]]
    ) -> None:
        for schedule in schedules:
            self._check(schedule, schedules)
        self._per_epoch = horizon.iterations_per_epoch or 1
        # MMEngine steps all of them in the list's order when they are built, later the epoch-based ones last.
        self._at_build = list(zip(schedules, bases, strict=True))
        self._later = sorted(self._at_build, key=lambda pair: pair[0].epoch_unit)
        spans = [schedule.span(horizon) for schedule in schedules]
        self._begin = min(begin for begin, _ in spans)
        self._end = max(end for _, end in spans)
        self._entry = list(entry)
        self._rewind()

    @staticmethod
    def _check(schedule: Schedule, schedules: Sequence[Schedule]) -> None:
        from_zero = schedule.length > 1 and schedule.multiple(0) == 0 != schedule.multiple(1)
        if not schedule.chainable or from_zero:
            others = ", ".join(other.path for other in schedules if other is not schedule)
            why = "it starts at 0" if from_zero else "it does not step from one value to the next"
            schedule.refuse(f"it overlaps with {others}, and {why}: let one begin where the other ends")

    def _rewind(self) -> None:
        self._tick = self._begin - 1
        self._values = list(self._entry)

    @property
    def exit(self) -> list[float]:
        return self.values(self._end, 0)

    def begun(self, iteration: int, epoch: int) -> bool:
        return iteration >= self._begin

    def values(self, iteration: int, epoch: int) -> list[float]:
        target = min(iteration, self._end - 1)
        if target < self._tick:
            self._rewind()
        while self._tick < target:
            self._tick += 1
            self._step(self._tick)
        return list(self._values)

    def _step(self, iteration: int) -> None:
        for schedule, bases in self._later if iteration else self._at_build:
            if schedule.epoch_unit:
                count, rest = divmod(iteration, self._per_epoch)
                if rest:
                    continue
            else:
                count = iteration
            t = count - schedule.start
            if 0 <= t < schedule.length:
                pairs = zip(self._values, bases, strict=True)
                self._values = [schedule.advance(t, value, base) for value, base in pairs]


def compose(
    schedules: Sequence[Schedule], horizon: Horizon, values: Sequence[float], *, groups: int
) -> list[ScheduleSegment | ProductSegment | SteppedSegment]:
    """The segments of the schedules of one group value, in the order of time.

    ``schedules`` are placed and act at some time; ``values`` are the config's, one for each of the optimizer's
    ``groups``, and one more where a group without multipliers is kept for the log.
    """
    bases: dict[int, list[float]] = {}
    current = list(values)
    for schedule in schedules:
        own = schedule.own_bases(groups)
        if own is not None:
            current = own + own[-1:] * (len(values) - groups)
        bases[id(schedule)] = current
    segments: list[ScheduleSegment | ProductSegment | SteppedSegment] = []
    for members in overlapping(schedules, horizon):
        entry = segments[-1].exit if segments else list(values)
        segment: ScheduleSegment | ProductSegment | SteppedSegment
        if len(members) == 1:
            segment = ScheduleSegment(members[0], entry, bases[id(members[0])])
        elif all(member.multiplicative for member in members):
            segment = ProductSegment(members, entry)
        else:
            segment = SteppedSegment(members, horizon, entry, [bases[id(member)] for member in members])
        segments.append(segment)
    return segments


def overlapping(schedules: Sequence[Schedule], horizon: Horizon) -> list[list[Schedule]]:
    """Sets of schedules whose spans overlap, in the order of time; inside a set in the order of the list."""
    sets: list[list[Schedule]] = []
    reach = -1
    for schedule in sorted(schedules, key=lambda one: one.span(horizon)[0]):
        begin, end = schedule.span(horizon)
        if begin < reach:
            sets[-1].append(schedule)
        else:
            sets.append([schedule])
        reach = max(reach, end)
    order = {id(schedule): index for index, schedule in enumerate(schedules)}
    return [sorted(members, key=lambda one: order[id(one)]) for members in sets]
