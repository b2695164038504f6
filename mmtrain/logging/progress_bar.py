"""The progress bar: what it shows, and when it is drawn."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

from mmtrain.logging.lines import format_seconds
from mmtrain.logging.terminal import LiveLine, live_line

REFRESH = 0.1  # seconds between two drawings
SMOOTHING = 3.0  # seconds over which samples/s is smoothed
WIDEST_BAR = 40


@dataclass(slots=True)
class Shown:
    """The numbers of one drawing; None is shown as ``-``. ``rate`` is samples/s, ``wait`` the share of time in data."""

    done: int
    total: int | None = None
    loss: float | None = None
    lr: float | None = None
    rate: float | None = None
    wait: float | None = None
    eta: float | None = None
    note: str = ""


def render(shown: Shown, columns: int, *, unicode: bool = True) -> str:
    """One line of at most ``columns`` characters; the bar itself takes what the numbers leave."""
    percent = f"{100 * shown.done // shown.total:3d}% " if shown.total else ""
    count = f"{str(shown.done).rjust(len(str(shown.total)))}/{shown.total}" if shown.total else str(shown.done)
    loss = "-" if shown.loss is None else f"{shown.loss:.4g}"
    lr = "-" if shown.lr is None else f"{shown.lr:.1e}"
    wait = "-" if shown.wait is None else f"{shown.wait:.0%}"
    eta = "-" if shown.eta is None else format_seconds(shown.eta)
    unit = "samples/s" if columns >= 90 else "smp/s"
    tail = f" {count} loss {loss} lr {lr} {_short(shown.rate)} {unit} data {wait} eta {eta}"
    room = min(columns - len(percent) - len(tail) - 2, WIDEST_BAR)
    share = shown.done / shown.total if shown.total else 0.0
    bar = f"[{_bar(share, room, unicode, shown.note)}]" if (shown.total or shown.note) and room >= 4 else ""
    return (percent + bar + (tail if percent or bar else tail.lstrip()))[:columns]


class ProgressBar:
    """Draws the bar at most ten times a second and works out samples/s and ETA from counters alone.

    ``live`` says whether there is a terminal to draw on. ``due`` is the time, on ``clock``, before which `update` need
    not be called; infinity where nothing is drawn.
    """

    def __init__(self, line: LiveLine = live_line, *, clock: Callable[[], float] = perf_counter) -> None:
        self._line = line
        self._clock = clock
        self.live = False
        self.due = math.inf
        self._began_at = self._seen_at = 0.0
        self._began_done = 0
        self._seen_samples = 0
        self._rate: float | None = None
        self._last: Shown | None = None

    def start(self, done: int, samples: int) -> None:
        """Begin at iteration ``done``, when ``samples`` samples have been consumed."""
        self._began_at = self._seen_at = self._clock()
        self._began_done, self._seen_samples, self._rate, self._last = done, samples, None, None
        self.live = self._line.available
        self.due = -math.inf if self.live else math.inf

    def update(self, shown: Shown, samples: int) -> None:
        """Draw; ``rate`` and ``eta`` of ``shown`` are filled in here."""
        if not self.live:
            return
        now = self._clock()
        self._measure(now, samples)
        shown.rate = self._rate
        done_here = shown.done - self._began_done
        if shown.total is not None and done_here > 0:
            shown.eta = (now - self._began_at) / done_here * max(shown.total - shown.done, 0)
        self._draw(shown)

    def note(self, text: str) -> None:
        """Draw the last numbers once more with a notice in the bar, while something else than training goes on."""
        if self.live and self._last is not None:
            self._last.note = text
            self._seen_at = self._clock()  # this time is no training time
            self._draw(self._last)

    def finish(self) -> None:
        """Leave the last drawing standing and draw no more."""
        if self.live and self._last is not None:
            self._line.finish(render(self._last, self._line.columns, unicode=self._line.unicode))
        self._stop()

    def abandon(self) -> None:
        """Take the bar away, so that an error message stands alone."""
        if self.live:
            self._line.clear()
        self._stop()

    def _stop(self) -> None:
        self.live, self.due = False, math.inf

    def _draw(self, shown: Shown) -> None:
        self._line.show(render(shown, self._line.columns, unicode=self._line.unicode))
        self._last = shown
        self.due = self._clock() + REFRESH

    def _measure(self, now: float, samples: int) -> None:
        elapsed = now - self._seen_at
        if elapsed <= 0 or samples <= self._seen_samples:
            return
        rate = (samples - self._seen_samples) / elapsed
        weight = 1.0 if self._rate is None else 1 - math.exp(-elapsed / SMOOTHING)
        self._rate = rate if self._rate is None else self._rate + weight * (rate - self._rate)
        self._seen_at, self._seen_samples = now, samples


def _bar(share: float, width: int, unicode: bool, note: str) -> str:
    full, empty = ("█", "·") if unicode else ("#", ".")
    if note:
        return note[:width].ljust(width, empty)
    done = min(int(share * width), width)
    return full * done + empty * (width - done)


def _short(value: float | None) -> str:
    if value is None:
        return "-"
    for limit, divisor, unit in ((1e4, 1.0, ""), (1e6, 1e3, "k"), (1e9, 1e6, "M")):
        if value < limit:
            scaled = value / divisor
            return f"{scaled:.0f}{unit}" if scaled >= 100 else f"{scaled:.1f}{unit}"
    return f"{value / 1e9:.1f}G"
