"""How all ranks hear that one has failed, and who tells the user.

The first rank that fails leaves a note in the store that the process group was made with. A thread on every rank looks
for it twice a second: a rank that waits in a collective for the one that is gone would otherwise wait for the timeout.
Rank 0 tells the cause, because it is the one whose terminal is watched; where rank 0 itself is gone, the others do.
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

KEY, TOLD, HEARD = "mmtrain/failure", "mmtrain/told", "mmtrain/heard"
_GONE = re.compile(r"gloo.*(Connection (closed|reset) by peer|Broken pipe)|ncclRemoteError", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Failure:
    """What ended a rank: the sentence to tell, with the exit status that all ranks then have."""

    rank: int
    sentence: str
    status: int
    trace: str = ""


class Alarm:
    """One rank's ear for failures. ``grace`` are the seconds a rank gets to end by itself after another's failure."""

    def __init__(
        self, store: Any, rank: int, size: int, *, grace: float = 2.0, leave: Callable[[int], Any] = os._exit
    ) -> None:
        self.rank, self.size = rank, size
        self.errors: Path | None = None
        self._store, self._grace, self._leave = store, grace, leave
        self._over = threading.Event()
        self._telling = threading.Lock()
        self._told = False
        self._thread = threading.Thread(target=self._watch, name="mmtrain-alarm", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._over.set()
        self._thread.join(timeout=5)

    def report(self, own: Failure) -> int:
        """Tell everyone that this rank has failed; returns, once it may exit, the status to exit with.

        Call it in the handler of the exception. The traceback goes to ``<errors>/rank_<k>.txt`` where a log directory
        is known. Rank 0 prints; another rank prints only where rank 0 can no longer be reached.
        """
        self._write(own)
        try:
            first = self._first(own)
        except Exception:  # the store lived in rank 0, or beside it
            self._over.set()
            if self.rank == 0:
                self._tell(own, own)
            else:
                self._say_lost(f" ({own.sentence})")
            return own.status
        if self.rank == 0:
            self._tell(first, own)
            self._wait_for_others()
        else:
            self._over.set()  # this process ends by itself, and not before its time
            self._wait_for_the_words()
            self._heard()
        self._over.set()
        return first.status

    def tell(self, cause: Failure) -> None:
        """Print a cause that rank 0 cannot print."""
        self._tell(cause, None)

    def _first(self, own: Failure) -> Failure:
        note = self._store.compare_set(KEY, "", json.dumps(asdict(own)))
        return Failure(**json.loads(note))

    def _write(self, failure: Failure) -> None:
        if self.errors is None or not failure.trace:
            return
        try:
            self.errors.mkdir(parents=True, exist_ok=True)
            (self.errors / f"rank_{failure.rank}.txt").write_text(failure.trace, encoding="utf-8")
        except OSError as error:
            sys.stderr.write(f"rank {failure.rank}: its traceback could not be written: {error}\n")

    def _tell(self, first: Failure, own: Failure | None) -> None:
        """Print the cause once: the first failure, named by its rank unless rank 0 failed of the same by itself."""
        with self._telling:
            if self._told:
                return
            self._told = True
            alike = own is not None and own.sentence == first.sentence
            if alike and own is not None and own.trace and not _is_told_in_one_sentence(own):
                sys.stderr.write(f"\nerror: {own.sentence}\n{own.trace}")
            else:
                where = "" if alike else f"rank {first.rank}: "
                sys.stderr.write(f"\nerror: {where}{first.sentence}\n")
                if not alike and first.trace and self.errors is not None:
                    sys.stderr.write(f"Its traceback is in {self.errors / f'rank_{first.rank}.txt'}\n")
                elif not alike and first.trace and not _is_told_in_one_sentence(first):
                    sys.stderr.write(first.trace)
            sys.stderr.flush()

    def _heard(self) -> None:
        try:
            self._store.add(HEARD, 1)
        except Exception:
            return

    def _wait_for_the_words(self) -> None:
        """Stay until rank 0 has told: torchrun ends all processes as soon as one of them has."""
        deadline = time.monotonic() + 2 * self._grace + 3.0
        try:
            while time.monotonic() < deadline and not self._store.check([TOLD]):
                time.sleep(0.05)
        except Exception:
            return

    def _wait_for_others(self) -> None:
        """The store may end with this process: stay until every other rank is about to leave, or is gone."""
        deadline = time.monotonic() + 2 * self._grace + 1.0
        try:
            self._store.set(TOLD, "")
            while time.monotonic() < deadline and self._store.add(HEARD, 0) < self.size - 1:
                time.sleep(0.05)
        except Exception:
            return

    def _watch(self) -> None:
        while not self._over.wait(0.5):
            try:
                if not self._store.check([KEY]):
                    continue
                first = Failure(**json.loads(self._store.get(KEY)))
            except Exception:
                if not self._over.is_set():
                    self._lost()
                return
            # The main thread hears of it by itself wherever it communicates: it then ends in good order.
            if not self._over.wait(self._grace):
                self._end(first)
            return

    def _end(self, first: Failure) -> None:
        if self.rank == 0:
            self._tell(first, None)
            self._wait_for_others()
        else:
            self._heard()
        if not self._over.is_set():
            self._leave(first.status)

    def _lost(self) -> None:
        """The store is gone, and with it rank 0."""
        if self._over.wait(self._grace):
            return
        self._say_lost("")
        self._leave(1)

    def _say_lost(self, detail: str) -> None:
        lost = "lost the connection to rank 0: it was killed, or its machine is gone"
        sys.stderr.write(f"\nerror: rank {self.rank}: {lost}{detail}\n")
        sys.stderr.flush()


def lost_connection(error: Exception) -> bool:
    """Whether torch's exchange failed because another process is gone; gloo and NCCL tell it by a text of theirs."""
    return isinstance(error, RuntimeError) and _GONE.search(str(error)) is not None


def _is_told_in_one_sentence(failure: Failure) -> bool:
    return not failure.sentence.startswith("the run failed with ")
