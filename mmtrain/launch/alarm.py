"""Ends all ranks when one fails, and reports the cause once.

The first rank that fails writes a note into the store that the process group was made with. A thread on every rank
checks for it twice a second; without it, a rank that waits in a collective for the failed one would wait for the
timeout. Rank 0 prints the cause, because its terminal is the one that is watched; if rank 0 itself is gone, the others
print.

Why not torch elastic alone: torchrun's agent ends the processes of its machine when one of them fails, and can start
them again; mmtrain leaves both to it. But it prints a table of 20 lines after the tracebacks of all ranks, most of them
"Connection closed by peer"; it exits with 1 whatever the processes exited with (2 for a config error, 75 after a
signal); it sees a failed process on another machine only through a broken connection; and under srun and mpirun there
is no agent. So the cause in one sentence, the exit status and the end of waiting ranks are here, for every launcher.
"""

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Keys of the store: the first failure; set once rank 0 has printed it; the number of other ranks that have seen it.
FAILURE_KEY = "mmtrain/failure"
REPORTED_KEY = "mmtrain/reported"
ACKNOWLEDGED_KEY = "mmtrain/acknowledged"
_GONE = re.compile(r"gloo.*(Connection (closed|reset) by peer|Broken pipe)|ncclRemoteError", re.DOTALL)


@dataclass(frozen=True, slots=True)
class RankFailure:
    """What ended a rank: the sentence to print, and the exit status that all ranks then have."""

    rank: int
    sentence: str
    status: int
    trace: str = ""


class Alarm:
    """Watches for failures of other ranks and reports this rank's.

    ``grace`` is the number of seconds that a rank gets to end by itself after another one failed; ``leave`` ends the
    process. ``host`` is the process that the store is in, as the message about its end calls it.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        *,
        grace: float = 2.0,
        leave: Callable[[int], Any] = os._exit,
        host: str = "rank 0",
    ) -> None:
        self.rank = rank
        self.size = size
        self.errors: Path | None = None
        self._store = store
        self._grace = grace
        self._host = host
        self._leave = leave
        self._over = threading.Event()
        self._printing = threading.Lock()
        self._printed = False
        self._thread = threading.Thread(target=self._watch, name="mmtrain-alarm", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._over.set()
        self._thread.join(timeout=5)

    def report(self, own: RankFailure) -> int:
        """Report this rank's failure to all ranks; returns, once it may exit, the status to exit with.

        Call it while the exception is handled. The traceback goes to ``<errors>/rank_<k>.txt`` if a log directory
        is known. Rank 0 prints; another rank prints only if rank 0 can no longer be reached.
        """
        self._write(own)
        try:
            first = self._first(own)
        except Exception:  # the store's process is gone, or its machine
            self._over.set()
            if self.rank == 0:
                self._print(own, own)
            else:
                self._print_lost(f" ({own.sentence})")
            return own.status
        if self.rank == 0:
            self._print(first, own)
            self._wait_for_others()
        else:
            self._over.set()  # this process ends by itself
            self._wait_for_report()
            self._acknowledge()
        self._over.set()
        return first.status

    def print_cause(self, cause: RankFailure) -> None:
        """Print a cause that rank 0 cannot print."""
        self._print(cause, None)

    def _first(self, own: RankFailure) -> RankFailure:
        note = self._store.compare_set(FAILURE_KEY, "", json.dumps(asdict(own)))
        return RankFailure(**json.loads(note))

    def _write(self, failure: RankFailure) -> None:
        if self.errors is None or not failure.trace:
            return
        try:
            self.errors.mkdir(parents=True, exist_ok=True)
            (self.errors / f"rank_{failure.rank}.txt").write_text(failure.trace, encoding="utf-8")
        except OSError as error:
            sys.stderr.write(f"rank {failure.rank}: cannot write its traceback: {error}\n")

    def _print(self, first: RankFailure, own: RankFailure | None) -> None:
        """Print the cause once: the first failure, with its rank unless this rank failed for the same reason."""
        with self._printing:
            if self._printed:
                return
            self._printed = True
            alike = own is not None and own.sentence == first.sentence
            if alike and own is not None and own.trace and not _is_reported_error(own):
                sys.stderr.write(f"\nerror: {own.sentence}\n{own.trace}")
            else:
                where = "" if alike else f"rank {first.rank}: "
                sys.stderr.write(f"\nerror: {where}{first.sentence}\n")
                if not alike and first.trace and self.errors is not None:
                    sys.stderr.write(f"Its traceback is in {self.errors / f'rank_{first.rank}.txt'}\n")
                elif not alike and first.trace and not _is_reported_error(first):
                    sys.stderr.write(first.trace)
            sys.stderr.flush()

    def _acknowledge(self) -> None:
        try:
            self._store.add(ACKNOWLEDGED_KEY, 1)
        except Exception:
            return

    def _wait_for_report(self) -> None:
        """Wait until rank 0 has printed: torchrun ends all processes as soon as one of them has ended."""
        deadline = time.monotonic() + 2 * self._grace + 3.0
        try:
            while time.monotonic() < deadline and not self._store.check([REPORTED_KEY]):
                time.sleep(0.05)
        except Exception:
            return

    def _wait_for_others(self) -> None:
        """Wait until every other rank is about to exit, or gone: the store may end with this process."""
        deadline = time.monotonic() + 2 * self._grace + 1.0
        try:
            self._store.set(REPORTED_KEY, "")
            while time.monotonic() < deadline and self._store.add(ACKNOWLEDGED_KEY, 0) < self.size - 1:
                time.sleep(0.05)
        except Exception:
            return

    def _watch(self) -> None:
        while not self._over.wait(0.5):
            try:
                if not self._store.check([FAILURE_KEY]):
                    continue
                first = RankFailure(**json.loads(self._store.get(FAILURE_KEY)))
            except Exception:
                if not self._over.is_set():
                    self._lost()
                return
            # The main thread notices by itself where it communicates, and then closes what is open.
            if not self._over.wait(self._grace):
                self._end(first)
            return

    def _end(self, first: RankFailure) -> None:
        if self.rank == 0:
            self._print(first, None)
            self._wait_for_others()
        else:
            self._acknowledge()
        if not self._over.is_set():
            self._leave(first.status)

    def _lost(self) -> None:
        """End this process: the store is gone with the process that it was in."""
        if self._over.wait(self._grace):
            return
        self._print_lost("")
        self._leave(1)

    def _print_lost(self, detail: str) -> None:
        lost = f"lost the connection to {self._host}: it was killed, or its machine is gone"
        sys.stderr.write(f"\nerror: rank {self.rank}: {lost}{detail}\n")
        sys.stderr.flush()


def is_lost_connection(error: Exception) -> bool:
    """Whether torch's exchange failed because another process is gone; gloo and NCCL say so in the message only."""
    return isinstance(error, RuntimeError) and _GONE.search(str(error)) is not None


def _is_reported_error(failure: RankFailure) -> bool:
    return not failure.sentence.startswith("the run failed with ")
