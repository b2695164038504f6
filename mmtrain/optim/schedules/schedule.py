"""The base of every schedule: a closed form of a position inside a span of the run."""

import math
from dataclasses import dataclass, field
from typing import NoReturn

from mmtrain.source_lines import config_error


@dataclass(frozen=True)
class Horizon:
    """How long the run is, as far as that is known before it starts.

    ``iterations_per_epoch`` is None for data of unknown length; such a run is measured by ``max_iters``.
    """

    max_iters: int | None = None
    max_epochs: int | None = None
    iterations_per_epoch: int | None = None

    @property
    def iterations(self) -> int | None:
        """The run's true length in iterations."""
        if self.max_iters is not None:
            return self.max_iters
        if self.max_epochs is None or self.iterations_per_epoch is None:
            return None
        return self.max_epochs * self.iterations_per_epoch

    @property
    def epochs(self) -> int | None:
        """The run's true length in epochs, counting an incomplete last one."""
        if self.max_epochs is not None:
            return self.max_epochs
        if self.max_iters is None or not self.iterations_per_epoch:
            return None
        return -(-self.max_iters // self.iterations_per_epoch)


@dataclass(kw_only=True, eq=False)
class Schedule:
    """How one value of the optimizer's groups runs over the span ``[begin, end)``; its last value holds afterwards.

    A custom schedule derives from this class, is registered in ``PARAM_SCHEDULERS`` and implements `multiple`::

        @PARAM_SCHEDULERS.register_module()
        class InverseRootLR(Schedule):
            def multiple(self, t):
                return (t + 1) ** -0.5

    (for further arguments, decorate it with ``dataclass(kw_only=True, eq=False)`` and write them as fields, or write an
    ``__init__`` that passes the rest to ``super().__init__``). It needs no state and no ``step``.

    * ``param_name``: the key of the groups that it sets; ``momentum`` means ``betas[0]`` in optimizers that have betas;
    * ``begin``, ``end``: in iterations, or epochs if ``by_epoch`` is set; ``end`` defaults to the run's true length;
    * ``convert_to_iter_based``: ``begin`` and ``end`` (and the schedule's other lengths) are given in epochs, the value
      runs by iterations;
    * ``last_step``, ``verbose``: MMEngine's arguments, accepted and not needed: the position is the run's.
    """

    param_name: str = field(default="lr", init=False)
    begin: float = 0
    end: float | None = None
    by_epoch: bool = True
    convert_to_iter_based: bool = False
    last_step: int = -1
    verbose: bool = False

    # Where the schedule begins and ends, in its unit; `place` sets them.
    epoch_unit = False
    start = 0
    length = 0
    path = "param_scheduler"

    # Whether `multiple` and `floor` describe a step from one value to the next, so that it may overlap with others.
    chainable = True

    # ---- what a custom schedule implements ----
    def multiple(self, t: int) -> float:
        """The multiple of the value found at ``begin`` that holds at step ``t`` of the span, 0 <= t < ``length``."""
        raise NotImplementedError(f"{type(self).__name__} gives no multiple(t)")

    # ---- for curves that are not a plain multiple ----
    def floor(self, base: float) -> float:
        """The value that `multiple` approaches: the result is ``floor + (source - floor) * multiple``."""
        return 0.0

    def source(self, t: int, entry: float, base: float) -> float:
        """What `multiple` applies to: ``entry``, the value found at ``begin``; ``base`` is the one in the config."""
        return entry

    def advance(self, t: int, value: float, base: float) -> float:
        """Step ``t`` in MMEngine's recursive form: the next value from the current one.

        Needed only where schedules overlap of which one has a floor: then no closed form of their product exists.
        """
        floor = self.floor(base)
        if t == 0:
            return floor + (value - floor) * self.multiple(0)
        before = self.multiple(t - 1)
        return floor + (value - floor) * (self.multiple(t) / before) if before else floor

    def own_bases(self, groups: int) -> list[float] | None:
        """The base value of every group from here on in the list, where the schedule sets it (one-cycle does)."""
        return None

    @property
    def keeps_source(self) -> bool:
        """Whether `source` is always ``entry``, so that it need not be asked."""
        return type(self).source is Schedule.source

    @property
    def multiplicative(self) -> bool:
        """Whether every value is a plain multiple of the value at ``begin``, so that overlaps are products."""
        return type(self).floor is Schedule.floor and self.keeps_source

    def settle(self, per_epoch: int) -> None:
        """Check the arguments of the subclass and compute what `multiple` needs; ``start`` and ``length`` are known.

        Its lengths are multiplied by ``per_epoch`` (1 unless ``convert_to_iter_based``). Raises ConfigError.
        """

    # ---- where it begins and ends ----
    def place(self, horizon: Horizon, path: str) -> None:
        """Fix ``start`` and ``length`` for a run of this length. Raises ConfigError."""
        self.path = path
        self._check_span()
        self.epoch_unit = self.by_epoch and not self.convert_to_iter_based
        per_epoch = horizon.iterations_per_epoch
        if self.by_epoch and not per_epoch:
            self.refuse("by_epoch=True needs epochs of known length: give by_epoch=False and begin, end in iterations")
        run = horizon.epochs if self.epoch_unit else horizon.iterations
        if self.end is None and run is None:
            self.refuse("the length of the run is not known here: give end")
        if self.convert_to_iter_based:
            assert per_epoch
            # int() as MMEngine has it: neighbours written with the same expression meet without a gap.
            self.start = int(self.begin * per_epoch)
            given = None if self.end is None else int(self.end * per_epoch)
        else:
            self.start = self._whole("begin", self.begin)
            given = None if self.end is None else self._whole("end", self.end)
        stop = run if given is None else given
        assert stop is not None
        self.length = max(0, stop - self.start)
        if self.length:
            self.settle(per_epoch if self.convert_to_iter_based and per_epoch else 1)

    def span(self, horizon: Horizon) -> tuple[int, int]:
        """Begin and end in iterations."""
        unit = (horizon.iterations_per_epoch or 1) if self.epoch_unit else 1
        return self.start * unit, (self.start + self.length) * unit

    def refuse(self, sentence: str) -> NoReturn:
        """Raise a ConfigError that names this schedule."""
        raise config_error(self.path, f"{type(self).__name__}: {sentence}")

    def _check_span(self) -> None:
        if self.begin < 0:
            self.refuse(f"begin is {self.begin}, expected 0 or more")
        if self.end is not None and self.end <= self.begin:
            self.refuse(f"end is {self.end}, expected more than begin, which is {self.begin}")
        if self.convert_to_iter_based and not self.by_epoch:
            self.refuse("convert_to_iter_based=True needs by_epoch=True: begin and end are then in epochs")

    def _whole(self, name: str, value: float, per_epoch: int = 1) -> int:
        """A length as an integer of the schedule's unit; products like 0.03 * 1000 are allowed their rounding.

        With ``per_epoch`` iterations in an epoch the value was given in epochs, and a part of an iteration is cut off.
        """
        value *= per_epoch
        if per_epoch > 1 and math.isfinite(value):
            return math.floor(value + 1e-6)
        if not math.isfinite(value) or abs(value - round(value)) >= 1e-6:
            unit = "epochs" if self.epoch_unit else "iterations"
            hint = ": convert_to_iter_based=True allows parts of an epoch" if self.epoch_unit else ""
            self.refuse(f"{name} is {value} {unit}, expected an integer{hint}")
        return round(value)
