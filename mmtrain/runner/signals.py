"""SIGTERM, SIGUSR1 and Ctrl-C: recorded, and handled at the end of a step; a second one exits at once."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from mmtrain import launch
from mmtrain.interruption import wait

PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try the same command again
INTERRUPTED = 130

_WATCHED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@contextmanager
def starting() -> Iterator[None]:
    """While a run is being built: SIGTERM and SIGUSR1 leave at once, since there is nothing to save, with status 75.

    Without this they would end the process with a status that no scheduler takes for "try again". `Signals` takes over
    when the run begins. Outside the main thread nothing is watched.
    """
    own_pid, previous = os.getpid(), {}

    def leave(number: int, frame: FrameType | None) -> None:
        if os.getpid() != own_pid:  # a child that was forked in between
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if launch.is_reporting_rank():
            os.write(2, f"{signal.Signals(number).name} received before training began; nothing to save\n".encode())
        os._exit(PREEMPTED)

    with suppress(ValueError):
        for number in (signal.SIGTERM, signal.SIGUSR1):
            previous[number] = signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Signals:
    """Watches for the signals that ask a run to leave; use it as a context manager around the run.

    ``announce`` logs a sentence as soon as a signal arrives. ``received`` is the number of the first signal, else 0.
    Handlers are restored on leaving. Outside the main thread, where Python allows no handlers, nothing is watched.
    """

    def __init__(self, announce: Callable[[str], None] | None = None) -> None:
        self._announce = announce
        self.received = 0
        self.agreed = 0  # the signal that another rank received, once all have agreed to leave
        self._own_pid = os.getpid()
        self._in_worker = 0
        self._previous: dict[int, Any] = {}

    @property
    def exit_status(self) -> int:
        """The status to exit with: 130 for Ctrl-C, 75 for the others, 0 without a signal."""
        number = self.received or self.agreed
        if not number:
            return 0
        return INTERRUPTED if number == signal.SIGINT else PREEMPTED

    @property
    def name(self) -> str:
        number = self.received or self.agreed
        return signal.Signals(number).name if number else ""

    def __enter__(self) -> "Signals":
        self._own_pid = os.getpid()
        try:
            for number in _WATCHED:
                self._previous[number] = signal.signal(number, self._note)
        except ValueError:  # not the main thread
            self._previous.clear()
        return self

    def __exit__(self, *_: object) -> None:
        wait.requested = False
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._own_pid:
            # A forked data worker inherits this handler. A signal to the whole process group must not kill it: the main
            # process may still need batches to finish its window. A second SIGTERM is the parent ending a stuck worker.
            self._in_worker += number == signal.SIGTERM
            if self._in_worker >= 2:
                os._exit(1)
            return
        if self.received:
            os._exit(128 + number)  # asked twice: leave now; what is half-written has no manifest and does not count
        self.received = number
        if self._announce is not None:
            # In a thread: the code that was interrupted may be in the middle of writing to the log itself.
            sentence = f"{self.name} received: saving after this update and leaving; a second signal leaves at once"
            threading.Thread(target=self._announce, args=(sentence,), name="mmtrain-signal", daemon=True).start()
        wait.interrupt()
