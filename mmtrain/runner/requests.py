"""Requests for the end of a step, for checkpoints and stops: from hooks, signals and clocks."""

import logging
import math
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from mmtrain import dist
from mmtrain.runner.signals import Signals

SECONDS_BETWEEN_EXCHANGES = 5.0


@dataclass(frozen=True, slots=True)
class SaveRequest:
    """Why a checkpoint was asked for.

    ``temporary`` ones are deleted when a newer one exists; ``best`` names the metric whose best value this is;
    ``weights_only`` asks for the weights under ``weights/`` and no checkpoint; ``blocking`` waits until it is complete.
    """

    reason: str
    temporary: bool = False
    best: str | None = None
    weights_only: bool = False
    blocking: bool = False


class StepRequests:
    """Collects the requests of a step. The train loop reads them at the end of the step, at a window's end.

    With several ranks, hooks must make the same requests on every rank. Two kinds may differ, because the world outside
    decides them: signals, and saves with the reason "time". One rank's signal or clock counts for all, from the same
    step on (`agree`).
    """

    def __init__(self, logger: logging.Logger) -> None:
        self.signals = Signals(announce=logger.info)
        self.saves: list[SaveRequest] = []
        self.stop_reason: str | None = None
        self.stops_for_good = False  # the same command would stop at the same place again
        self._logger = logger
        self._clock_is_due = False
        self._exchange = _Exchange() if dist.world_size() > 1 else None

    def request_save(self, reason: str, **options: Any) -> None:
        """Ask for a checkpoint; ``options`` are those of `SaveRequest`."""
        if reason == "time" and self._exchange is not None:
            self._clock_is_due = True  # until all ranks know
        else:
            self.saves.append(SaveRequest(reason=reason, **options))

    def request_stop(self, reason: str, *, for_good: bool = False) -> None:
        """Ask the run to end."""
        if self.stop_reason is None:
            self.stop_reason = reason
            self.stops_for_good = for_good
            self._logger.info("Stopping at the end of this step: %s", reason)

    def agree(self, iteration: int, *, is_logged: bool, at_window_end: bool) -> None:
        """Turn a signal or a clock of any rank into requests of every rank; called at the end of each step."""
        if self._exchange is None:
            if self.signals.received:
                self._leave()
        elif at_window_end and self._exchange.is_due(iteration, is_logged=is_logged):
            signal, clock = self._exchange(iteration, self.signals.received, self._clock_is_due)
            self._clock_is_due = False
            if clock:
                self.saves.append(SaveRequest("time", temporary=True))
            if signal:
                self.signals.agreed = signal
                self._leave()

    def take_saves(self) -> list[SaveRequest]:
        """The requests for checkpoints so far, which are then forgotten."""
        saves = self.saves
        self.saves = []
        return saves

    def _leave(self) -> None:
        if self.stop_reason is None:
            self.request_save("signal", blocking=True)
            self.request_stop(f"{self.signals.name} received; saving before leaving")


class _Exchange:
    """Decides when ranks exchange what they know, at iterations that all of them can compute, and exchanges it.

    They do so at the end of the first window, of every window that holds a logged iteration, and, if log lines are
    more than about ``seconds`` apart, that often (counted in iterations, from the slowest rank's pace, which the
    exchange itself carries). Each exchange is one all-reduce of three numbers on the CPU.
    """

    def __init__(self, seconds: float = SECONDS_BETWEEN_EXCHANGES) -> None:
        self._seconds = seconds
        self._every = 1
        self._last = -1  # the iteration of the last exchange
        self._when = 0.0

    def is_due(self, iteration: int, *, is_logged: bool) -> bool:
        return is_logged or self._last < 0 or iteration - self._last >= self._every

    def __call__(self, iteration: int, signal: int, clock: bool) -> tuple[int, bool]:
        """The greatest signal of any rank, and whether any rank's clock is due. A collective."""
        pace = (perf_counter() - self._when) / (iteration - self._last) if self._last >= 0 else 0.0
        notes = torch.tensor([float(signal), float(clock), pace], dtype=torch.float64)
        torch.distributed.all_reduce(notes, op=torch.distributed.ReduceOp.MAX)
        greatest, any_clock, slowest = notes.tolist()
        if slowest > 0.0:
            self._every = max(1, math.ceil(self._seconds / slowest))
        self._last = iteration
        self._when = perf_counter()
        return int(greatest), bool(any_clock)
