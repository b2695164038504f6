"""Ends all ranks when one fails, and reports the cause once.

The first rank that fails writes a note into the store that the process group was made with, before it closes anything:
what the others then see is a broken connection. A thread on every rank checks for the note twice a second; without it,
a rank that waits in a collective for the failed one would wait for the timeout. Rank 0 prints the cause, because its
terminal is the one that is watched; where it does not answer, the first rank that does. A rank that was killed leaves
no note: then the others name the ranks that do not answer.

Why not torch elastic alone: torchrun's agent ends the processes of its machine when one of them fails, and can start
them again; mmtrain leaves both to it. But it prints a table of 20 lines after the tracebacks of all ranks, most of them
"Connection closed by peer"; it exits with 1 whatever the processes exited with (2 for a config error, 75 after a
signal); it sees a failed process on another machine only through a broken connection; and under srun and mpirun there
is no agent. So the cause in one sentence, the exit status and the end of waiting ranks are here, for every launcher.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmtrain.launch.failure import RankFailure
from mmtrain.printable import listed

# Keys of the store: the first failure; one for each rank that has seen it; set once it is printed; the number of ranks
# that are about to exit.
FAILURE_KEY = "mmtrain/failure"
SEEN_KEY = "mmtrain/seen"
REPORTED_KEY = "mmtrain/reported"
ACKNOWLEDGED_KEY = "mmtrain/acknowledged"
_PERIOD = 0.5  # seconds between two looks
_NAMED = 8  # ranks that a message lists


class Alarm:
    """Watches for failures of other ranks and reports this rank's.

    ``grace`` is the number of seconds that a rank gets to end by itself after another one failed, and to answer;
    ``leave`` ends the process. ``host`` is the process that the store is in, as the message about its end calls it.
    """

    def __init__(
        self, store: Any, rank: int, size: int, *, grace: float = 2.0, host: str = "rank 0",
        leave: Callable[[int], Any] = os._exit,
    ) -> None:  # fmt: skip
        self.rank = rank
        self.size = size
        self.errors: Path | None = None
        self._host = host
        self._store = store
        self._grace = grace
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

    def note(self, own: RankFailure) -> None:
        """Tell the other ranks of this rank's failure, before it closes what they may wait for; `report` follows."""
        self._write(own)
        try:
            if self._first(own) == own:
                self._over.set()  # closing may take longer than the others get
        except Exception:  # `report` will meet it too
            return

    def report(self, own: RankFailure) -> int:
        """Report this rank's failure to all ranks; returns, once it may exit, the status to exit with.

        The traceback goes to ``<errors>/rank_<k>.txt`` where a log directory is known. One rank prints.
        """
        self._write(own)
        if self.rank != 0:
            self._over.set()  # this process ends by itself
        try:
            first = self._first(own)
            is_reporter = self._is_reporter()
        except Exception:  # the store is gone: it was in rank 0, or in torchrun's agent
            self._over.set()
            if self.rank == 0 and not own.is_lost:
                self._print(own, own)
            else:
                self._print_lost("" if own.is_lost else f" ({own.sentence})")
            return own.status
        if is_reporter:
            self._print(first, own)
            self._wait_for_others()
        else:
            self._wait_for_report()
            self._acknowledge()
        self._over.set()
        return first.status or own.status

    def print_cause(self, cause: RankFailure) -> None:
        """Print a cause that rank 0 cannot print."""
        self._print(cause, None)

    def _first(self, own: RankFailure) -> RankFailure:
        note = self._store.compare_set(FAILURE_KEY, "", json.dumps(asdict(own)))
        self._store.set(f"{SEEN_KEY}/{self.rank}", "")
        return RankFailure(**json.loads(note))

    def _is_reporter(self) -> bool:
        """Whether this rank prints: rank 0, or the first rank that answers where rank 0 does not."""
        deadline = time.monotonic() + self._grace + _PERIOD
        while self.rank != 0 and time.monotonic() < deadline:
            if self._store.check([REPORTED_KEY]) or self._store.check([f"{SEEN_KEY}/0"]):
                return False
            time.sleep(0.05)
        return not any(self._store.check([f"{SEEN_KEY}/{rank}"]) for rank in range(self.rank))

    def _silent(self) -> list[int]:
        """The ranks that have not seen the failure: they are gone, or stopped."""
        deadline = time.monotonic() + self._grace + _PERIOD
        silent = [rank for rank in range(self.size) if rank != self.rank]
        try:
            while silent and time.monotonic() < deadline:
                silent = [rank for rank in silent if not self._store.check([f"{SEEN_KEY}/{rank}"])]
                time.sleep(0.05)
        except Exception:  # the store went in between: nothing is known of the others
            return []
        return silent

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
            silent = self._silent() if first.is_lost else []
            alike = own is not None and own.sentence == first.sentence
            if silent:
                sys.stderr.write(f"\nerror: {_gone(silent)}\n")
            elif alike:
                sys.stderr.write(f"\nerror: {first.sentence}\n{first.trace if first.is_unforeseen else ''}")
            else:
                sys.stderr.write(f"\nerror: rank {first.rank}: {first.sentence}\n")
                if first.trace and self.errors is not None:
                    sys.stderr.write(f"Its traceback is in {self.errors / f'rank_{first.rank}.txt'}\n")
                elif first.is_unforeseen:
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
        while not self._over.wait(_PERIOD):
            try:
                if not self._store.check([FAILURE_KEY]):
                    continue
                first = RankFailure(**json.loads(self._store.get(FAILURE_KEY)))
                self._store.set(f"{SEEN_KEY}/{self.rank}", "")
            except Exception:
                if not self._over.is_set():
                    self._lost()
                return
            # The main thread notices by itself where it communicates, and then closes what is open.
            if not self._over.wait(self._grace):
                self._end(first)
            return

    def _end(self, first: RankFailure) -> None:
        try:
            is_reporter = self._is_reporter()
        except Exception:
            self._lost()
            return
        if is_reporter:
            self._print(first, None)
            self._wait_for_others()
        else:
            self._wait_for_report()
            self._acknowledge()
        if not self._over.is_set():
            self._leave(first.status or 1)

    def _lost(self) -> None:
        """End this process: the store is gone, and who held it."""
        if self._over.wait(self._grace):
            return
        self._print_lost("")
        self._leave(1)

    def _print_lost(self, detail: str) -> None:
        lost = f"lost the connection to {self._host}: it was killed, or its machine is gone"
        sys.stderr.write(f"\nerror: rank {self.rank}: {lost}{detail}\n")
        sys.stderr.flush()


def _gone(ranks: list[int]) -> str:
    who = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {listed([*map(str, ranks)], _NAMED)}"
    return (
        f"{who} ended without a report: killed (out of memory?), crashed in a library (its last words may be above), "
        "or the machine is gone; the other ranks lost the connection to it"
    )
