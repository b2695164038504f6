"""Ends a run that makes no progress, and says which rank the others wait for.

A thread on each rank checks what the rank has done: iterations, and `heartbeat.beat`, which validation, saves and the
verification of a checkpoint call while they work. Ranks that made progress increase one number in the group's store; a
run in which it stays the same for ``seconds`` is stuck. A rank that waits for a slow one is not. Then each rank writes
its stacks, and rank 0 names the rank that the others wait for. The time during which a process was suspended does not
count.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from mmtrain import heartbeat
from mmtrain.errors import RunError
from mmtrain.launch.alarm import FAILURE_KEY, Alarm
from mmtrain.launch.failure import RankFailure
from mmtrain.launch.stacks import RankLocation, locate, write_stacks
from mmtrain.printable import listed

# Keys of the store: the number that progress increases; set when a rank found the run stuck; where each rank is.
PROGRESS_KEY = "mmtrain/progress"
STUCK_KEY = "mmtrain/stuck"
LOCATION_KEY = "mmtrain/location"
_PERIOD = 5.0  # seconds between two checks
_NAMED = 8  # ranks that are listed in the cause


class StoreConnection:
    """Asks the store in a separate thread, so that a store whose process is stopped does not block the watchdog."""

    def __init__(self, store: Any, patience: float) -> None:
        self._store = store
        self._patience = patience
        self._asking: threading.Thread | None = None

    def ask(self, question: Callable[[Any], Any]) -> Any:
        """The answer, or None if it did not arrive in time. Of the store's calls only `set` returns None itself."""
        if self._asking is not None:
            self._asking.join(self._patience)
            if self._asking.is_alive():
                return None
        answer: list[Any] = []

        def asking() -> None:
            try:
                answer.append(question(self._store))
            except Exception:  # the store is gone, which the alarm reports
                return

        self._asking = threading.Thread(target=asking, name="mmtrain-watchdog-store", daemon=True)
        self._asking.start()
        self._asking.join(self._patience)
        return answer[0] if answer else None


class Watchdog:
    """Watches one rank. ``store`` and ``alarm`` are those of a group; a single process has none.

    ``position`` returns the number of iterations done; ``leave`` ends the process.
    """

    def __init__(
        self, seconds: float, *, rank: int = 0, size: int = 1, store: Any = None, alarm: Alarm | None = None,
        position: Callable[[], int] = lambda: 0, leave: Callable[[int], Any] = os._exit,
    ) -> None:  # fmt: skip
        self.errors: Path | None = None
        self.position = position
        self._seconds = seconds
        self._rank = rank
        self._size = size
        self._leave = leave
        self._period = min(_PERIOD, seconds / 4)
        self._answers_within = 2 * self._period + 5.0
        self._store = StoreConnection(store, max(self._period, 1.0)) if store is not None else None
        self._alarm = alarm
        self._own: tuple[int, int] | None = None
        self._total: int | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="mmtrain-watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._over.set()
        self._thread.join(timeout=5)

    def _watch(self) -> None:
        idle = 0.0
        looked = time.monotonic()
        while not self._over.wait(self._period):
            moved = self._moved()
            now = time.monotonic()
            # A process that was suspended did not look in between: that time does not count.
            idle = 0.0 if moved else idle + min(now - looked, 2 * self._period + 1.0)
            looked = now
            if idle >= self._seconds or self._is_stuck_elsewhere():
                self._end()
                return

    def _moved(self) -> bool:
        """Whether this rank, or any other, has made progress since the last check."""
        own = (self.position(), heartbeat.count())
        moved, self._own = own != self._own, own
        if self._store is None:
            return moved
        total = self._store.ask(lambda it: it.add(PROGRESS_KEY, int(moved)))
        if total is None:
            return moved
        others, self._total = total != self._total, total
        return moved or others

    def _is_stuck_elsewhere(self) -> bool:
        return self._store is not None and bool(self._store.ask(lambda it: it.check([STUCK_KEY])))

    # ---- the end --------------------------------------------------------------------------------------------------
    def _end(self) -> None:
        store = self._store
        if store is not None:
            store.ask(lambda it: it.set(STUCK_KEY, str(self._rank)))
        own = self._write_stacks()
        if self._over.is_set():
            return
        if store is None:
            self._print_and_leave(f"{self._no_progress()}: stuck after iteration {own.iteration} in {own.place}; ")
        elif self._rank == 0:
            self._report_cause(store, own)
        else:
            self._wait_for_rank_0(store, own)

    def _write_stacks(self) -> RankLocation:
        """Write this rank's stacks; return where it is."""
        iteration, workers = self.position(), []
        try:
            if self.errors is None:
                workers = write_stacks(sys.stderr)
            else:
                self.errors.mkdir(parents=True, exist_ok=True)
                with (self.errors / f"hang_rank_{self._rank}.txt").open("w", encoding="utf-8") as file:
                    file.write(f"rank {self._rank}, process {os.getpid()}, after {iteration} iterations\n\n")
                    file.flush()
                    workers = write_stacks(file)
        except Exception as error:  # a full disk, a stderr that is not a file: the run must end anyway
            sys.stderr.write(f"rank {self._rank}: cannot write its stacks: {error}\n")
        return locate(self._rank, iteration, workers)

    def _report_cause(self, store: StoreConnection, own: RankLocation) -> None:
        """Collect where the ranks are; the first rank to do so writes the failure by which the alarm ends all ranks."""
        locations = {own.rank: own}
        deadline = time.monotonic() + self._answers_within
        missing = [rank for rank in range(self._size) if rank != own.rank]
        while missing and not self._over.is_set():
            for rank in list(missing):
                text = store.ask(partial(_read, key=f"{LOCATION_KEY}/{rank}"))
                if text:
                    locations[rank] = RankLocation(**json.loads(text))
                    missing.remove(rank)
            if time.monotonic() > deadline or (missing and self._over.wait(0.2)):
                break
        cause = RankFailure(*find_cause(locations, missing, self._no_progress(), self._where()), RunError.exit_status)
        note = store.ask(lambda it: it.compare_set(FAILURE_KEY, "", json.dumps(asdict(cause))))
        if note is None or self._alarm is None:
            self._print_and_leave(cause.sentence)
        elif self._rank != 0 and json.loads(note) == asdict(cause):
            self._alarm.print_cause(cause)

    def _wait_for_rank_0(self, store: StoreConnection, own: RankLocation) -> None:
        """Send rank 0 this rank's location and wait for the alarm; if rank 0 does not answer, report the cause."""
        text = json.dumps(asdict(own))
        deadline = time.monotonic() + 2 * self._answers_within
        reached = store.ask(lambda it: it.add(PROGRESS_KEY, 0)) is not None
        store.ask(lambda it: it.set(f"{LOCATION_KEY}/{self._rank}", text))
        while reached and time.monotonic() < deadline:
            if self._over.wait(0.5) or store.ask(lambda it: it.check([FAILURE_KEY])):
                return  # the alarm ends this process
        if reached:
            self._report_cause(store, own)
            return
        self._print_and_leave(
            f"{self._no_progress()} and rank 0, which holds the group's store, did not answer: it is stopped, or its "
            f"machine is gone; {own}; "
        )

    def _no_progress(self) -> str:
        return f"no progress for {self._seconds:g} seconds (env_cfg.timeout)"

    def _where(self) -> str:
        return f"the stacks are in {self.errors / 'hang_rank_*.txt'}" if self.errors else "the stacks are above"

    def _print_and_leave(self, sentence: str) -> None:
        who = f"rank {self._rank}: " if self._size > 1 else ""
        where = self._where() if sentence.endswith("; ") else ""
        sys.stderr.write(f"\nerror: {who}{sentence}{where}\n")
        sys.stderr.flush()
        if not self._over.is_set():
            self._leave(RunError.exit_status)


def _read(store: Any, *, key: str) -> Any:
    return store.get(key) if store.check([key]) else b""


def find_cause(locations: dict[int, RankLocation], missing: list[int], no_progress: str, where: str) -> tuple[int, str]:
    """The rank that the others wait for, and the sentence.

    It is a rank that did not answer; otherwise, of those that did the fewest iterations, one that waits for no other.
    """
    everyone = sorted(locations.values(), key=lambda s: (s.iteration, s.waits, s.rank))
    if missing:
        gone = f"ranks {', '.join(map(str, missing[:_NAMED]))}" if len(missing) > 1 else f"rank {missing[0]}"
        why = f"{gone} did not answer: stopped, its machine gone, or in C code that keeps Python's lock"
        return missing[0], f"{no_progress} and {why}; {_list(everyone)}; {where}"
    first = everyone[0]
    if first.waits:
        return first.rank, f"{no_progress}, the ranks wait for one another: {_list(everyone)}; {where}"
    alike = [s for s in everyone if (s.iteration, s.waits) == (first.iteration, False)]
    others = [s for s in everyone if s not in alike]
    stuck = f"stuck after iteration {first.iteration} in {first.place}"
    more = f", like {_list(alike[1:])}" if alike[1:] else ""
    waiting = f"; the others wait: {_list(others)}" if others else ""
    return first.rank, f"{no_progress}: {stuck}{more}{waiting}; {where}"


def _list(locations: list[RankLocation]) -> str:
    return listed([*map(str, locations)], _NAMED)
