"""The shapes of schedules, each as a closed form of the step ``t`` inside its span.

MMEngine 0.10.7 defines them by recursion (``mmengine/optim/scheduler/param_scheduler.py``); these are the solutions of
its recursions, so that a value needs no history. Arguments, defaults and the treatment of the ends are MMEngine's. The
classes here lack only the name of the value that they set; the names for configs are in `classes`.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from mmtrain.optim.schedules.schedule import Schedule


def half_cosine(t: float, period: float) -> float:
    """From 1 at ``t = 0`` down to 0 at ``t = period``: half a wave of the cosine."""
    return (1 + math.cos(math.pi * t / period)) / 2


@dataclass(kw_only=True, eq=False)
class Constant(Schedule):
    """``entry * factor``; the last step of the span puts back the value found at ``begin``, as in MMEngine."""

    factor: float = 1.0 / 3

    def settle(self, per_epoch: int) -> None:
        if not 0 <= self.factor <= 1:
            self.refuse(f"factor is {self.factor}, expected 0 to 1")

    def multiple(self, t: int) -> float:
        return self.factor if t == 0 or t < self.length - 1 else 1.0


@dataclass(kw_only=True, eq=False)
class Linear(Schedule):
    """From ``entry * start_factor`` to ``entry * end_factor``, reached at the last step of the span."""

    start_factor: float = 1.0 / 3
    end_factor: float = 1.0

    def settle(self, per_epoch: int) -> None:
        for name in ("start_factor", "end_factor"):
            if not 0 <= getattr(self, name) <= 1:
                self.refuse(f"{name} is {getattr(self, name)}, expected 0 to 1")
        self._last = max(1, self.length - 1)
        self._slope = (self.end_factor - self.start_factor) / self._last

    def multiple(self, t: int) -> float:
        # Not by the slope at the end: a warm-up to 1.0 must leave exactly the config's value.
        return self.start_factor + self._slope * t if t < self._last else self.end_factor


@dataclass(kw_only=True, eq=False)
class Exponential(Schedule):
    """``entry * gamma ** t``."""

    gamma: float

    def multiple(self, t: int) -> float:
        return self.gamma**t


@dataclass(kw_only=True, eq=False)
class Step(Schedule):
    """Multiplied by ``gamma`` every ``step_size`` steps."""

    step_size: float
    gamma: float = 0.1

    def settle(self, per_epoch: int) -> None:
        if self.step_size <= 0:
            self.refuse(f"step_size is {self.step_size}, expected more than 0")
        self._every = max(1, self._whole("step_size", self.step_size, per_epoch))

    def multiple(self, t: int) -> float:
        return self.gamma ** (t // self._every)


@dataclass(kw_only=True, eq=False)
class MultiStep(Schedule):
    """Multiplied by ``gamma`` at each of the ``milestones``, which count from ``begin``."""

    milestones: Sequence[float]
    gamma: float = 0.1

    def settle(self, per_epoch: int) -> None:
        self._at = [self._whole("a milestone", milestone, per_epoch) for milestone in self.milestones]
        if self._at != sorted(self._at) or (self._at and self._at[0] < 0):
            self.refuse(f"milestones are {list(self.milestones)}, expected rising numbers of 0 or more")

    def multiple(self, t: int) -> float:
        return self.gamma ** bisect_right(self._at, t)


@dataclass(kw_only=True, eq=False)
class Poly(Schedule):
    """``eta_min + (entry - eta_min) * (1 - t / T) ** power``, where ``T`` is the last step of the span."""

    eta_min: float = 0.0
    power: float = 1.0

    def multiple(self, t: int) -> float:
        last = self.length - 1
        return ((last - t) / last) ** self.power if t else 1.0

    def floor(self, base: float) -> float:
        return self.eta_min

    @property
    def multiplicative(self) -> bool:
        return not self.eta_min


@dataclass(kw_only=True, eq=False)
class CosineFloor(Schedule):
    """A floor: ``eta_min``, or ``eta_min_ratio`` times the value in the config; 0 by default."""

    eta_min: float | None = None
    eta_min_ratio: float | None = None

    def floor(self, base: float) -> float:
        return (self.eta_min or 0.0) if self.eta_min_ratio is None else base * self.eta_min_ratio

    def settle(self, per_epoch: int) -> None:
        if self.eta_min is not None and self.eta_min_ratio is not None:
            self.refuse("both eta_min and eta_min_ratio are given, expected one of them")

    @property
    def multiplicative(self) -> bool:
        return not self.eta_min and not self.eta_min_ratio


@dataclass(kw_only=True, eq=False)
class CosineAnnealing(CosineFloor):
    """``floor + (entry - floor) * (1 + cos(pi * t / T_max)) / 2``; ``T_max`` defaults to the length of the span.

    Past ``T_max`` the value rises again, and towards the config's value instead of the one found at ``begin``: so does
    MMEngine's recursion, which (like PyTorch's) starts again from the floor.
    """

    T_max: float | None = None

    def settle(self, per_epoch: int) -> None:
        super().settle(per_epoch)
        if self.T_max is not None and self.T_max <= 0:
            self.refuse(f"T_max is {self.T_max}, expected more than 0")
        self._period = self.length if self.T_max is None else self.T_max * per_epoch

    def multiple(self, t: int) -> float:
        return (1 + math.cos(math.pi * t / self._period)) / 2

    def source(self, t: int, entry: float, base: float) -> float:
        return base if t > self._period and self._period == int(self._period) else entry

    @property
    def keeps_source(self) -> bool:
        return self.length - 1 <= self._period

    def advance(self, t: int, value: float, base: float) -> float:
        if t and (t - 1 - self._period) % (2 * self._period) == 0:
            return value + (base - self.floor(base)) * (1 - math.cos(math.pi / self._period)) / 2
        return super().advance(t, value, base)

    @property
    def multiplicative(self) -> bool:
        return super().multiplicative and self.keeps_source


@dataclass(kw_only=True, eq=False)
class CosineRestart(CosineFloor):
    """Cosines one after another: number ``k`` falls from ``base * restart_weights[k]`` to the floor in ``periods[k]``.

    After the last period its last value holds.
    """

    periods: Sequence[float]
    restart_weights: Sequence[float] = (1,)

    def settle(self, per_epoch: int) -> None:
        super().settle(per_epoch)
        self._lengths = [self._whole("a period", period, per_epoch) for period in self.periods]
        if not self._lengths or min(self._lengths) <= 0:
            self.refuse(f"periods are {list(self.periods)}, expected numbers of more than 0")
        if len(self.restart_weights) != len(self._lengths):
            self.refuse(f"there are {len(self._lengths)} periods and {len(self.restart_weights)} restart_weights")
        self._starts = list(accumulate(self._lengths, initial=0))

    def _position(self, t: int) -> tuple[int, int]:
        """The number of the period that contains ``t``, and the step inside it."""
        t = min(t, self._starts[-1] - 1)
        index = bisect_right(self._starts, t) - 1
        return index, t - self._starts[index]

    def multiple(self, t: int) -> float:
        index, step = self._position(t)
        return half_cosine(step, self._lengths[index])

    def source(self, t: int, entry: float, base: float) -> float:
        return base * self.restart_weights[self._position(t)[0]]

    def advance(self, t: int, value: float, base: float) -> float:
        if self._position(t)[1] == 0 and t < self._starts[-1]:
            return self.source(t, value, base)
        return super().advance(t, value, base)

    @property
    def multiplicative(self) -> bool:
        return False


@dataclass(kw_only=True, eq=False)
class OneCycle(Schedule):
    """Up from ``eta_max / div_factor`` to ``eta_max``, then down to ``eta_max / div_factor / final_div_factor``.

    The 1cycle policy of https://arxiv.org/abs/1708.07120. It sets the value whatever was found at ``begin``, and
    ``eta_max / div_factor`` is from then on the base value of later schedules in the list. ``eta_max`` may be a list
    with one value for each group. ``end`` defaults to ``begin + total_steps`` if ``total_steps`` is given.
    """

    eta_max: float | Sequence[float]
    total_steps: int | None = None
    pct_start: float = 0.3
    anneal_strategy: str = "cos"
    div_factor: float = 25.0
    final_div_factor: float = 1e4
    three_phase: bool = False

    def settle(self, per_epoch: int) -> None:
        self._check()
        total = self.length if self.total_steps is None else self.total_steps * per_epoch
        if self.total_steps is not None and self.end is None:
            self.length = min(self.length, total)
        elif self.length > total + 1:
            self.refuse(f"total_steps is {total}, expected at least end - begin, which is {self.length}")
        low, lowest = 1 / self.div_factor, 1 / (self.div_factor * self.final_div_factor)
        rise = float(self.pct_start * total)
        # (last step, value at its start, value at its end), in multiples of eta_max
        self._phases = [(rise - 1, low, 1.0)]
        if self.three_phase:
            self._phases += [(2 * rise - 2, 1.0, low), (total - 1, low, lowest)]
        else:
            self._phases += [(total - 1, 1.0, lowest)]

    def _check(self) -> None:
        if self.param_name != "lr":
            self.refuse(f"param_name is {self.param_name!r}, expected 'lr', the only value it is for")
        if self.total_steps is not None and self.total_steps <= 0:
            self.refuse(f"total_steps is {self.total_steps}, expected more than 0")
        if not 0 <= self.pct_start <= 1:
            self.refuse(f"pct_start is {self.pct_start}, expected 0 to 1")
        if self.anneal_strategy not in ("cos", "linear"):
            self.refuse(f"anneal_strategy is {self.anneal_strategy!r}, expected 'cos' or 'linear'")
        if self.div_factor <= 0 or self.final_div_factor <= 0:
            self.refuse("div_factor and final_div_factor are expected to be more than 0")

    def multiple(self, t: int) -> float:
        begin = 0.0
        last = self._phases[-1]
        for end, low, high in self._phases:
            if t <= end or (end, low, high) == last:
                break
            begin = end
        share = (t - begin) / (end - begin) if end != begin else 1.0
        if self.anneal_strategy == "linear":
            return low + (high - low) * share
        return high + (low - high) * half_cosine(share, 1.0)

    def source(self, t: int, entry: float, base: float) -> float:
        return base * self.div_factor

    def advance(self, t: int, value: float, base: float) -> float:
        return self.source(t, value, base) * self.multiple(t)

    def own_bases(self, groups: int) -> list[float]:
        if isinstance(self.eta_max, int | float):
            return [self.eta_max / self.div_factor] * groups
        if len(self.eta_max) != groups:
            self.refuse(f"eta_max has {len(self.eta_max)} values, expected one for each of the {groups} groups")
        return [peak / self.div_factor for peak in self.eta_max]


@dataclass(kw_only=True, eq=False)
class WarmupCosine(CosineFloor):
    """``entry * t / warmup`` up to ``entry``, then a cosine down to the floor at the end of the span.

    The form most language models are trained with. ``warmup_iters`` or ``warmup_ratio`` (of the span) says how long the
    first part is. Iteration-based unless ``by_epoch=True, convert_to_iter_based=True``; ``warmup_iters`` is always in
    iterations. It starts at 0 and warms up by itself, so that it does not overlap with other schedules.
    """

    warmup_iters: int | None = None
    warmup_ratio: float | None = None
    by_epoch: bool = False

    chainable = False

    def settle(self, per_epoch: int) -> None:
        super().settle(per_epoch)
        if self.epoch_unit:
            self.refuse("it runs by iterations: give by_epoch=False, or convert_to_iter_based=True")
        if (self.warmup_iters is None) == (self.warmup_ratio is None):
            self.refuse("expected one of warmup_iters and warmup_ratio")
        if self.warmup_iters is not None:
            self._warmup = self._whole("warmup_iters", self.warmup_iters)
        else:
            self._warmup = round((self.warmup_ratio or 0.0) * self.length)
        if not 0 <= self._warmup <= self.length:
            self.refuse(f"the warm-up has {self._warmup} iterations, expected 0 to {self.length}, the whole schedule")

    def multiple(self, t: int) -> float:
        if t < self._warmup:
            return 1.0
        return half_cosine(t - self._warmup, max(1, self.length - self._warmup))

    def source(self, t: int, entry: float, base: float) -> float:
        return entry * (t / self._warmup) if t < self._warmup else entry

    @property
    def multiplicative(self) -> bool:
        return False
