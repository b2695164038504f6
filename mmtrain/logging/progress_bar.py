"""The progress bar: what it shows, and when it is drawn. rich draws it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

from mmtrain.logging.lines import format_seconds
from mmtrain.logging.terminal import LiveLine, live_line

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

REFRESH = 0.1  # seconds between two drawings
SMOOTHING = 3.0  # seconds over which samples/s is smoothed
NARROWEST_BAR = 4
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


class BarLine:
    """Draws the numbers as one line; the bar itself takes the width that they leave."""

    def __init__(self, shown: Shown) -> None:
        self._shown = shown

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich.progress_bar import ProgressBar as Bar
        from rich.text import Text

        shown = self._shown
        columns = options.max_width - 1  # some terminals wrap after the last column
        percent = f"{100 * shown.done // shown.total:3d}% " if shown.total else ""
        numbers = _numbers(shown, wide=columns >= 90)
        room = min(columns - len(percent) - len(numbers) - 1, WIDEST_BAR)
        if room < NARROWEST_BAR or not (shown.total or shown.note):
            yield Text((percent + numbers)[:columns], end="", no_wrap=True)
            return
        yield Text(percent, end="")
        if shown.note:
            yield Text(shown.note[:room].ljust(room, "." if options.ascii_only else "·"), end="")
        else:
            yield Bar(total=shown.total, completed=shown.done, width=room)
        yield Text(f" {numbers}", end="", no_wrap=True)


def _numbers(shown: Shown, *, wide: bool) -> str:
    count = f"{str(shown.done).rjust(len(str(shown.total)))}/{shown.total}" if shown.total else str(shown.done)
    loss = "-" if shown.loss is None else f"{shown.loss:.4g}"
    lr = "-" if shown.lr is None else f"{shown.lr:.1e}"
    wait = "-" if shown.wait is None else f"{shown.wait:.0%}"
    eta = "-" if shown.eta is None else format_seconds(shown.eta)
    unit = "samples/s" if wide else "smp/s"
    return f"{count} loss {loss} lr {lr} {_short(shown.rate)} {unit} data {wait} eta {eta}"


class ProgressBar:
    """Draws the bar at most ten times a second and computes samples/s and ETA from counters alone.

    ``live`` says whether there is a terminal to draw on. ``due`` is the time, on ``clock``, before which `update` need
    not be called: infinity without a terminal.
    """

    def __init__(self, line: LiveLine = live_line, *, clock: Callable[[], float] = perf_counter) -> None:
        self._line = line
        self._clock = clock
        self.live = False
        self.due = math.inf
        self._began_at = 0.0
        self._began_done = 0
        self._seen_at = 0.0
        self._seen_samples = 0
        self._rate: float | None = None
        self._last: Shown | None = None

    def start(self, done: int, samples: int) -> None:
        """Start at iteration ``done``, when ``samples`` samples have been consumed."""
        self._began_at = self._seen_at = self._clock()
        self._began_done = done
        self._seen_samples = samples
        self._rate = None
        self._last = None
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
        """Draw the last numbers again with a notice in place of the bar, while the run is not training."""
        if self.live and self._last is not None:
            self._last.note = text
            self._seen_at = self._clock()  # this time does not count as training
            self._draw(self._last)

    def finish(self) -> None:
        """Leave the last line on the terminal and stop drawing."""
        if self.live and self._last is not None:
            self._line.finish(BarLine(self._last))
        self._stop()

    def abandon(self) -> None:
        """Remove the bar, so that only the error message is left."""
        if self.live:
            self._line.clear()
        self._stop()

    def _stop(self) -> None:
        self.live, self.due = False, math.inf

    def _draw(self, shown: Shown) -> None:
        self._line.show(BarLine(shown))
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


def _short(value: float | None) -> str:
    if value is None:
        return "-"
    for limit, divisor, unit in ((1e4, 1.0, ""), (1e6, 1e3, "k"), (1e9, 1e6, "M")):
        if value < limit:
            scaled = value / divisor
            return f"{scaled:.0f}{unit}" if scaled >= 100 else f"{scaled:.1f}{unit}"
    return f"{value / 1e9:.1f}G"
