"""The position of a run: a few integers, and the arithmetic on them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(slots=True)
class Progress:
    """The position of a run. Only the train loop advances it.

    * ``epoch``: complete epochs;
    * ``offset``: samples of the current epoch that all ranks have consumed;
    * ``samples``: samples that all ranks have consumed since the run began;
    * ``iteration``: micro-batches done (the number in ``iter_1500.pth``; ``interval`` and ``max_iters`` count them);
    * ``epoch_iteration``: micro-batches done in the current epoch;
    * ``update``: optimizer steps that were applied;
    * ``skipped``: iterations whose update was not applied (loss scaler, non-finite loss); schedules do not count them.
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
        """Iterations as schedules count them: only those whose update was applied."""
        return self.iteration - self.skipped

    def state_dict(self) -> dict[str, int]:
        return asdict(self)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        for field in fields(self):
            setattr(self, field.name, int(state_dict[field.name]))


def iterations_per_epoch(samples: int, global_batch: int, *, drop_last: bool) -> int:
    """Iterations in one epoch of ``samples`` samples at ``global_batch`` samples per iteration."""
    return samples // global_batch if drop_last else -(-samples // global_batch)


def window_length(done: int, accumulative_counts: int, *, remaining: int | None) -> int:
    """Return the number of micro-batches in the accumulation window that begins after ``done`` iterations.

    ``remaining`` is the number of iterations until the window must end (at the end of the run, or of the epoch if
    windows do not span epochs), or None if that is unknown. The last window may be shorter than the others, and the
    loss is divided by its actual length.
    """
    if remaining is None:
        return accumulative_counts
    if remaining <= 0:
        raise ValueError(f"a window cannot begin after {done} iterations: no iteration is left")
    return min(accumulative_counts, remaining)
