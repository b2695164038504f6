"""What ``train_cfg`` asks for: when training ends and when it validates."""

from dataclasses import dataclass

from mmtrain.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TrainSchedule:
    """The length of a run and its validations. Exactly one of ``max_epochs`` and ``max_iters`` is set.

    Validation intervals are counted in the unit of the run's length. ``dynamic_intervals`` holds pairs
    ``(begin, interval)``: from ``begin`` on, validation runs every ``interval``. Raises ConfigError.
    """

    max_epochs: int | None = None
    max_iters: int | None = None
    val_begin: int = 1
    val_interval: int = 1
    dynamic_intervals: tuple[tuple[int, int], ...] = ()
    flush_at_epoch_end: bool = False
    nonfinite: str = "stop"
    ledger: bool = False

    def __post_init__(self) -> None:
        if (self.max_epochs is None) == (self.max_iters is None):
            raise ConfigError("train_cfg needs exactly one of max_epochs and max_iters")

    @property
    def by_epoch(self) -> bool:
        """Whether the run's length and its validation are counted in epochs."""
        return self.max_epochs is not None

    def validates_after(self, done: int, *, is_end: bool) -> bool:
        """Whether validation is due after ``done`` epochs or iterations (whichever this schedule counts)."""
        interval = self.val_interval
        for begin, value in self.dynamic_intervals:
            if done >= begin:
                interval = value
        return done >= self.val_begin and (is_end or (interval > 0 and done % interval == 0))
