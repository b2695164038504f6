"""Notices that nothing moves any more, has every rank write down where it stands, and ends the run.

A thread on each rank looks at what the rank has done: iterations, and `heartbeat.beat`, which validation, saves and the
check of a checkpoint call as they go on. Ranks that moved raise one number in the group's store, and a run in which it
does not rise for ``seconds`` is stuck: a rank that waits for a slow one is not. Then each rank writes its stacks, and
rank 0 names the one that the others wait for. A process that was suspended does not count the time.
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
from mmtrain.launch.alarm import FAILURE_KEY, Alarm, RankFailure
from mmtrain.launch.stacks import Standing, locate, write_stacks

PULSE, STUCK, STANDING = "mmtrain/pulse", "mmtrain/stuck", "mmtrain/standing"
_PERIOD = 5.0
_NAMED = 8  # ranks that are listed in the cause


class Line:
    """A connection to the store, asked in a thread of its own: a store whose process is stopped holds up nobody."""

    def __init__(self, store: Any, patience: float) -> None:
        self._store, self._patience = store, patience
        self._asking: threading.Thread | None = None

    def ask(self, question: Callable[[Any], Any]) -> Any:
        """The answer, or None where none came in time; the store's calls give None for nothing else but `set`."""
        if self._asking is not None:
            self._asking.join(self._patience)
            if self._asking.is_alive():
                return None
        answer: list[Any] = []

        def asking() -> None:
            try:
                answer.append(question(self._store))
            except Exception:  # the store is gone; the alarm tells of that
                return

        self._asking = threading.Thread(target=asking, name="mmtrain-watchdog-store", daemon=True)
        self._asking.start()
        self._asking.join(self._patience)
        return answer[0] if answer else None


class Watchdog:
    """One rank's watch. ``store`` and ``alarm`` are those of a group; a process alone has none.

    ``position`` gives the number of iterations done; ``leave`` ends the process.
    """

    def __init__(
        self, seconds: float, *, rank: int = 0, size: int = 1, store: Any = None, alarm: Alarm | None = None,
        position: Callable[[], int] = lambda: 0, leave: Callable[[int], Any] = os._exit,
    ) -> None:  # fmt: skip
        self.errors: Path | None = None
        self.position = position
        self._seconds, self._rank, self._size, self._leave = seconds, rank, size, leave
        self._period = min(_PERIOD, seconds / 4)
        self._answers_within = 2 * self._period + 5.0
        self._line = Line(store, max(self._period, 1.0)) if store is not None else None
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
        idle, looked = 0.0, time.monotonic()
        while not self._over.wait(self._period):
            moved = self._moved()
            now = time.monotonic()
            # A process that was stopped and goes on did not look in between: that time is nobody's fault.
            idle = 0.0 if moved else idle + min(now - looked, 2 * self._period + 1.0)
            looked = now
            if idle >= self._seconds or self._is_called():
                self._end()
                return

    def _moved(self) -> bool:
        """Whether this rank, or any other, has done something since the last look."""
        own = (self.position(), heartbeat.count())
        moved, self._own = own != self._own, own
        if self._line is None:
            return moved
        total = self._line.ask(lambda store: store.add(PULSE, int(moved)))
        if total is None:
            return moved
        others, self._total = total != self._total, total
        return moved or others

    def _is_called(self) -> bool:
        return self._line is not None and bool(self._line.ask(lambda store: store.check([STUCK])))

    # ---- the end --------------------------------------------------------------------------------------------------
    def _end(self) -> None:
        line = self._line
        if line is not None:
            line.ask(lambda store: store.set(STUCK, str(self._rank)))
        own = self._stand()
        if self._over.is_set():
            return
        if line is None:
            self._tell_and_leave(f"{self._stood()}: stuck after iteration {own.iteration} in {own.place}; ")
        elif self._rank == 0:
            self._name_the_cause(line, own)
        else:
            self._leave_it_to_rank_0(line, own)

    def _stand(self) -> Standing:
        """Write this rank's stacks; return where it stands."""
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
        except Exception as error:  # a full disk, a stderr that is no file: the run is to end all the same
            sys.stderr.write(f"rank {self._rank}: its stacks could not be written: {error}\n")
        return locate(self._rank, iteration, workers)

    def _name_the_cause(self, line: Line, own: Standing) -> None:
        """Collect where the ranks stand; whoever does so first leaves the note by which the alarm ends every rank."""
        standings = {own.rank: own}
        deadline = time.monotonic() + self._answers_within
        missing = [rank for rank in range(self._size) if rank != own.rank]
        while missing and not self._over.is_set():
            for rank in list(missing):
                text = line.ask(partial(_read, key=f"{STANDING}/{rank}"))
                if text:
                    standings[rank] = Standing(**json.loads(text))
                    missing.remove(rank)
            if time.monotonic() > deadline or (missing and self._over.wait(0.2)):
                break
        cause = RankFailure(*_cause(standings, missing, self._stood(), self._where()), RunError.exit_status)
        note = line.ask(lambda store: store.compare_set(FAILURE_KEY, "", json.dumps(asdict(cause))))
        if note is None or self._alarm is None:
            self._tell_and_leave(cause.sentence)
        elif self._rank != 0 and json.loads(note) == asdict(cause):
            self._alarm.print_cause(cause)

    def _leave_it_to_rank_0(self, line: Line, own: Standing) -> None:
        """Tell rank 0 where this one stands, and wait for the alarm; where rank 0 does not answer, tell the cause."""
        text = json.dumps(asdict(own))
        deadline = time.monotonic() + 2 * self._answers_within
        reached = line.ask(lambda store: store.add(PULSE, 0)) is not None
        line.ask(lambda store: store.set(f"{STANDING}/{self._rank}", text))
        while reached and time.monotonic() < deadline:
            if self._over.wait(0.5) or line.ask(lambda store: store.check([FAILURE_KEY])):
                return  # the alarm ends this process
        if reached:
            self._name_the_cause(line, own)
            return
        self._tell_and_leave(
            f"{self._stood()} and rank 0, which holds the group's store, did not answer: it is stopped, or its machine "
            f"is gone; {own}; "
        )

    def _stood(self) -> str:
        return f"no progress for {self._seconds:g} seconds (env_cfg.timeout)"

    def _where(self) -> str:
        return f"the stacks are in {self.errors / 'hang_rank_*.txt'}" if self.errors else "the stacks are above"

    def _tell_and_leave(self, sentence: str) -> None:
        who = f"rank {self._rank}: " if self._size > 1 else ""
        where = self._where() if sentence.endswith("; ") else ""
        sys.stderr.write(f"\nerror: {who}{sentence}{where}\n")
        sys.stderr.flush()
        if not self._over.is_set():
            self._leave(RunError.exit_status)


def _read(store: Any, *, key: str) -> Any:
    return store.get(key) if store.check([key]) else b""


def _cause(standings: dict[int, Standing], missing: list[int], stood: str, where: str) -> tuple[int, str]:
    """The rank that the others wait for, and the sentence.

    It is one that did not answer; else, of those behind all others, the one that waits for nobody.
    """
    everyone = sorted(standings.values(), key=lambda s: (s.iteration, s.waits, s.rank))
    if missing:
        gone = f"ranks {', '.join(map(str, missing[:_NAMED]))}" if len(missing) > 1 else f"rank {missing[0]}"
        told = f"{gone} did not answer: stopped, its machine gone, or in C code that keeps Python's lock"
        return missing[0], f"{stood} and {told}; {_list(everyone)}; {where}"
    first = everyone[0]
    if first.waits:
        return first.rank, f"{stood}, the ranks wait for one another: {_list(everyone)}; {where}"
    alike = [s for s in everyone if (s.iteration, s.waits) == (first.iteration, False)]
    others = [s for s in everyone if s not in alike]
    stands = "; ".join(f"stuck after iteration {s.iteration} in {s.place}" for s in alike[:1])
    more = f", like {_list(alike[1:])}" if alike[1:] else ""
    waiting = f"; the others wait: {_list(others)}" if others else ""
    return first.rank, f"{stood}: {stands}{more}{waiting}; {where}"


def _list(standings: list[Standing]) -> str:
    more = f" and {len(standings) - _NAMED} more" if len(standings) > _NAMED else ""
    return ", ".join(map(str, standings[:_NAMED])) + more
