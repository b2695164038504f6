"""Where a run stands: a handful of integers, and the arithmetic on them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(slots=True)
class Progress:
    """The position of a run. Only the train loop advances it.

    * ``epoch``: passes over the data that are complete;
    * ``offset``: samples consumed by all ranks in the current pass;
    * ``samples``: samples consumed by all ranks since the run began;
    * ``iteration``: micro-batches done (the number in ``iter_1500.pth``; what ``interval`` and ``max_iters`` count);
    * ``epoch_iteration``: micro-batches done in the current pass;
    * ``update``: optimizer steps that were applied;
    * ``skipped``: iterations whose update was not applied (loss scaler, non-finite loss); schedules leave them out.
    """

    epoch: int = 0
    offset: int = 0
    samples: int = 0
    iteration: int = 0
    epoch_iteration: int = 0
    update: int = 0
    skipped: int = 0

    def advance(self, samples: int, *, epoch_end: bool) -> None:
        """Count one iteration in which all ranks together consumed ``samples``."""
        self.iteration += 1
        self.samples += samples
        if epoch_end:
            self.epoch += 1
            self.offset = 0
            self.epoch_iteration = 0
        else:
            self.offset += samples
            self.epoch_iteration += 1

    def count_update(self, *, iterations: int, applied: bool) -> None:
        """Count the end of a window of ``iterations`` micro-batches."""
        if applied:
            self.update += 1
        else:
            self.skipped += iterations

    @property
    def scheduled(self) -> int:
        """Iterations as schedules count them: without those whose update was not applied."""
        return self.iteration - self.skipped

    def state_dict(self) -> dict[str, int]:
        return asdict(self)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        for field in fields(self):
            setattr(self, field.name, int(state_dict[field.name]))


def iterations_per_epoch(samples: int, global_batch: int, *, drop_last: bool) -> int:
    """Iterations in one pass over ``samples`` samples at ``global_batch`` samples an iteration."""
    return samples // global_batch if drop_last else -(-samples // global_batch)


def window_length(done: int, accumulative_counts: int, *, remaining: int | None) -> int:
    """Micro-batches of the window that begins after ``done`` iterations.

    ``remaining`` is how many iterations are left before the window must end (the end of the run, or of the epoch when
    windows are cut per epoch), or None when that is unknown. The last window may be shorter than the others, and the
    loss is divided by this true length.
    """
    if remaining is None:
        return accumulative_counts
    if remaining <= 0:
        raise ValueError(f"a window cannot begin after {done} iterations: none is left")
    return min(accumulative_counts, remaining)
