"""A pseudo-terminal of a given width, and what a person sees on it."""

import fcntl
import os
import pty
import re
import struct
import termios

_TOKEN = re.compile(r"\x1b\[(\??[\d;]*)([A-Za-z])|(\r)|(\n)|([^\x1b\r\n])")


class Screen:
    """Interprets what is written to a terminal: text, carriage returns, cursor up, erase line."""

    def __init__(self, columns):
        self.columns = columns
        self.widest = 0
        self._lines, self._row, self._column = [""], 0, 0

    @property
    def lines(self):
        return [line.rstrip() for line in self._lines]

    def feed(self, text):
        for argument, command, carriage, newline, character in _TOKEN.findall(text):
            if carriage:
                self._column = 0
            elif newline:
                self._row += 1
                if self._row == len(self._lines):
                    self._lines.append("")
            elif character:
                self._put(character)
            else:
                self._command(argument, command)

    def _put(self, character):
        if self._column == self.columns:  # wrap
            self._row, self._column = self._row + 1, 0
            if self._row == len(self._lines):
                self._lines.append("")
        line = self._lines[self._row]
        self._lines[self._row] = line[: self._column].ljust(self._column) + character + line[self._column + 1 :]
        self._column += 1
        self.widest = max(self.widest, self._column)

    def _command(self, argument, command):
        if command == "A":
            self._row -= int(argument or 1)
            assert self._row >= 0, "the cursor left the screen"
        elif command == "K":
            self._lines[self._row] = "" if argument == "2" else self._lines[self._row][: self._column]
        else:
            assert command in "mhl", f"unknown control sequence {argument}{command}"  # colours, the cursor's visibility


class PseudoTerminal:
    """A terminal with a stream to write to; `lines` are those on its screen."""

    def __init__(self, columns=80):
        self.screen = Screen(columns)
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        os.set_blocking(self.master, False)
        self.stream = os.fdopen(slave, "w", encoding="utf-8")
        self.raw = b""

    @property
    def lines(self):
        new = b""
        try:
            while data := os.read(self.master, 65536):
                new += data
        except BlockingIOError:
            pass
        self.raw += new
        self.screen.feed(new.decode())
        return self.screen.lines

    def resize(self, columns):
        fcntl.ioctl(self.stream.fileno(), termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.screen.columns = columns

    def close(self):
        self.stream.close()
        os.close(self.master)
