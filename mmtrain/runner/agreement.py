"""What one rank notices and all ranks must do at the same step: leaving on a signal, saving by the clock."""

from __future__ import annotations

import math
from time import perf_counter
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from mmtrain.runner.flexible_runner import FlexibleRunner

SECONDS = 5.0


class Agreement:
    """Lets ranks compare notes at iterations that all of them know beforehand.

    They look at the end of the first window, of every window that holds a logged iteration, and, where log lines are
    more than about ``seconds`` apart, that often (counted in iterations, from the slowest rank's pace, which the look
    itself exchanges). Each look is one all-reduce of three numbers on the CPU; between looks nothing is exchanged.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self.wants_save = False
        self._seconds = seconds
        self._every = 1
        self._looked_at = -1  # the iteration of the last look
        self._window_end = 0  # the last window end that was considered
        self._when = 0.0

    def look(self, runner: FlexibleRunner, *, log_interval: int) -> None:
        """Compare notes if it is time, and do what any rank asks for; called at each window's end."""
        done, before = runner.progress.iteration, self._window_end
        self._window_end = done
        logs = log_interval > 0 and done // log_interval > before // log_interval
        if not logs and self._looked_at >= 0 and done - self._looked_at < self._every:
            return
        now = perf_counter()
        pace = (now - self._when) / (done - self._looked_at) if self._looked_at >= 0 else 0.0
        notes = torch.tensor([float(runner.signals.received), float(self.wants_save), pace], dtype=torch.float64)
        torch.distributed.all_reduce(notes, op=torch.distributed.ReduceOp.MAX)
        signal, save, slowest = notes.tolist()
        if slowest > 0.0:
            self._every = max(1, math.ceil(self._seconds / slowest))
        self._looked_at, self._when, self.wants_save = done, perf_counter(), False
        if save:
            runner.saving.request_by_clock()
        if signal:
            runner.signals.agreed = int(signal)
            runner.leave_on_signal()
