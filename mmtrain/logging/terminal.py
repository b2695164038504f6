"""One live line at the bottom of the terminal, with log lines above it.

rich's Live draws it when asked, without a thread. It is imported when the first line is drawn: a run without a terminal
does not need it.
"""

import os
import shutil
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

# What rich raises when the terminal is gone; training continues without the line.
_GONE = (OSError, ValueError)


class LiveLine:
    """A line that is redrawn in place on a terminal. Write whole lines to the same terminal with `print_above`.

    ``stream`` defaults to what ``sys.stderr`` is when the line is first drawn.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._live: Live | None = None

    @property
    def stream(self) -> TextIO:
        return self._stream if self._stream is not None else sys.stderr

    @property
    def available(self) -> bool:
        """Whether there is a terminal that can redraw a line, with a person in front of it: CI has neither."""
        try:
            return self.stream.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("CI")
        except (AttributeError, ValueError):  # no stream, or a closed one
            return False

    def show(self, line: "RenderableType") -> None:
        """Draw ``line`` in place of the previous one."""
        with suppress(*_GONE):
            if self._live is None:
                self._live = _start(self.stream)
            self._live.console.width = _columns(self.stream)  # the window may have been resized
            self._live.update(line, refresh=True)

    def clear(self) -> None:
        """Remove the line."""
        self._stop(transient=True)

    def finish(self, line: "RenderableType") -> None:
        """Draw ``line`` for the last time and leave it on the terminal."""
        self.show(line)
        self._stop(transient=False)

    def print_above(self, text: str) -> bool:
        """Write ``text`` as whole lines above the line; returns False, and writes nothing, if no line is shown."""
        live = self._live
        if live is None:
            return False
        with suppress(*_GONE):
            live.console.out(text, highlight=False)
        return True

    def _stop(self, *, transient: bool) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.transient = transient
            with suppress(*_GONE):
                live.stop()


def _start(stream: TextIO) -> "Live":
    from rich.console import Console
    from rich.live import Live

    console = Console(file=stream, force_terminal=True, force_jupyter=False, highlight=False)
    # Without auto_refresh there is no thread that takes the interpreter from training. Without redirects, data workers
    # that are forked meanwhile keep plain streams.
    live = Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
    live.start()
    console.show_cursor(True)  # a process that is killed could not show it again
    return live


def _columns(stream: TextIO) -> int:
    """The width of this terminal; rich would take that of stdin."""
    try:
        width = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError, AttributeError):
        width = 0
    return width or shutil.get_terminal_size().columns


live_line = LiveLine()
