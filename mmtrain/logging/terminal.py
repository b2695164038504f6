"""One live line at the bottom of the terminal, and log lines that go above it."""

import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

ERASE_TO_END = "\x1b[K"


class LiveLine:
    """A line that is redrawn in place on a terminal. Whoever writes to the same terminal does so inside `above`.

    ``stream`` defaults to whatever ``sys.stderr`` is at the moment of use.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._text = ""
        # Re-entrant: a signal handler may log while the line is being drawn.
        self._lock = threading.RLock()

    @property
    def stream(self) -> TextIO:
        return self._stream if self._stream is not None else sys.stderr

    @property
    def available(self) -> bool:
        """Whether there is a terminal that can redraw a line."""
        try:
            return self.stream.isatty() and os.environ.get("TERM") != "dumb"
        except (AttributeError, ValueError):  # no stream, or a closed one
            return False

    @property
    def columns(self) -> int:
        """Characters that fit without a wrap."""
        try:
            width = os.get_terminal_size(self.stream.fileno()).columns
        except (OSError, ValueError, AttributeError):
            width = 0
        return (width or shutil.get_terminal_size().columns) - 1

    @property
    def unicode(self) -> bool:
        return (getattr(self.stream, "encoding", None) or "").lower().replace("-", "").startswith("utf")

    def show(self, text: str) -> None:
        """Draw ``text`` in the place of what was there."""
        with self._lock:
            self._text = text[: self.columns]
            self._write("\r" + self._text + ERASE_TO_END)

    def clear(self) -> None:
        """Take the line away."""
        with self._lock:
            if self._text:
                self._text = ""
                self._write("\r" + ERASE_TO_END)

    def finish(self, text: str) -> None:
        """Draw ``text`` for the last time and leave it standing."""
        with self._lock:
            self.show(text)
            self._text = ""
            self._write("\n")

    @contextmanager
    def above(self) -> Iterator[None]:
        """While this lasts the line is away and whole lines can be written; then it is drawn again below them."""
        with self._lock:
            text = self._text
            self.clear()
            try:
                yield
            finally:
                if text:
                    self.show(text)

    def _write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):  # the terminal is gone; training goes on
            self._text = ""


live_line = LiveLine()
