import fcntl
import io
import math
import os
import pty
import re
import struct
import termios

import pytest

from mmtrain.logging import LiveLine, ProgressBar, Shown, make_logger
from mmtrain.logging import console as console_module
from mmtrain.logging.progress_bar import REFRESH, render

FULL = Shown(done=1234, total=10000, loss=2.34567, lr=1e-3, rate=12345.6, wait=0.031, eta=754.0)


class Terminal:
    """A pseudo-terminal of 80 columns, and what a person would see on it."""

    def __init__(self, columns=80):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        os.set_blocking(self.master, False)
        self.stream = os.fdopen(slave, "w", encoding="utf-8")
        self.columns = columns
        self.lines, self.cursor = [""], 0
        self.widest = 0

    def screen(self):
        try:
            while data := os.read(self.master, 65536):
                self._take(data.decode())
        except BlockingIOError:
            pass
        return [line.rstrip() for line in self.lines]

    def _take(self, text):
        for token in re.findall(r"\x1b\[K|\r|\n|[^\x1b\r\n]", text):
            line = self.lines[-1]
            if token == "\r":
                self.cursor = 0
            elif token == "\n":
                self.lines.append("")
                self.cursor = 0
            elif token == "\x1b[K":
                self.lines[-1] = line[: self.cursor]
            else:
                self.lines[-1] = line[: self.cursor].ljust(self.cursor) + token + line[self.cursor + 1 :]
                self.cursor += 1
                self.widest = max(self.widest, self.cursor)

    def close(self):
        self.stream.close()
        os.close(self.master)


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    made = Terminal()
    yield made
    made.close()


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_the_line_at_80_columns():
    numbers = r" 1234/10000 loss 2\.346 lr 1\.0e-03 12\.3k smp/s data 3% eta 0:12:34"
    assert re.fullmatch(r" 12% \[·{6}\] " + numbers, text := render(FULL, 79)), text
    assert len(text) == 79


@pytest.mark.parametrize("columns", [10, 40, 60, 79, 100, 200])
def test_no_line_is_wider_than_the_terminal(columns):
    for shown in (FULL, Shown(done=10**9, total=10**9, eta=9e6, note="val 12"), Shown(done=3), Shown(0, 10)):
        assert len(render(shown, columns)) <= columns


def test_a_wide_terminal_has_the_whole_words_and_the_bar():
    text = render(FULL, 140)
    assert re.search(r"\[█{4}·{36}\]", text)
    assert "12.3k samples/s" in text
    assert render(FULL, 140, unicode=False).isascii()


def test_an_unknown_length_has_no_percent_and_no_bar():
    assert render(Shown(done=7, loss=1.0, lr=0.1, rate=3.25), 79) == "7 loss 1 lr 1.0e-01 3.2 smp/s data - eta -"


@pytest.mark.parametrize(
    ("rate", "text"),
    [(0.5, "0.5"), (99.94, "99.9"), (1234, "1234"), (56789, "56.8k"), (5e6, "5.0M"), (2e9, "2.0G")],
)
def test_rates_are_short(rate, text):
    assert f" {text} smp/s" in render(Shown(done=1, rate=rate), 79)


def test_log_lines_and_bar_do_not_garble_one_another(terminal, monkeypatch):
    line = LiveLine()
    monkeypatch.setattr(console_module, "live_line", line)
    monkeypatch.setattr("sys.stderr", terminal.stream)
    logger = make_logger("mmtrain.test_bar")
    clock = Clock()
    bar = ProgressBar(line, clock=clock)
    logger.info("before")
    bar.start(0, 0)
    for done in range(1, 51):
        clock.now += 0.05
        if clock.now >= bar.due:
            bar.update(Shown(done=done, total=50, loss=1 / done, lr=0.1, wait=0.0), done * 8)
        if done % 20 == 0:
            logger.info("iteration %d", done)
            assert len(terminal.screen()[-1]) > 60  # the bar stands below the line again
    bar.update(Shown(done=50, total=50, loss=0.02, lr=0.1, wait=0.0), 400)
    bar.finish()
    logger.info("after")
    screen = [re.sub(r"^.* - mmtrain - INFO - ", "", text) for text in terminal.screen()]
    assert screen[:3] == ["before", "iteration 20", "iteration 40"]
    assert re.fullmatch(r"100% \[█+\] 50/50 loss 0\.02 lr 1\.0e-01 160 smp/s data 0% eta 0:00:00", screen[3]), screen[3]
    assert screen[4:] == ["after", ""]
    assert terminal.widest < terminal.columns
    logger.handlers.clear()


def test_it_is_drawn_ten_times_a_second_at_most(terminal):
    clock = Clock()
    bar = ProgressBar(LiveLine(terminal.stream), clock=clock)
    bar.start(0, 0)
    drawn = 0
    for done in range(1, 1001):
        clock.now += 0.001
        if clock.now >= bar.due:
            bar.update(Shown(done=done, total=1000), done)
            drawn += 1
    assert drawn == pytest.approx(1.0 / REFRESH, abs=1)
    bar.abandon()
    assert terminal.screen() == [""]


def test_rate_and_eta_come_from_the_counters_of_this_process(terminal):
    clock = Clock()
    bar = ProgressBar(LiveLine(terminal.stream), clock=clock)
    bar.start(900, 7200)  # a resumed run
    clock.now += 10
    shown = Shown(done=910, total=1000)
    bar.update(shown, 7280)
    assert shown.rate == 8.0
    assert shown.eta == 90.0
    bar.note("val 3")
    assert re.match(r" 91% \[val 3·+\]  910/1000 ", terminal.screen()[-1])
    bar.abandon()


def test_a_file_gets_no_bar(tmp_path):
    with (tmp_path / "log").open("w", encoding="utf-8") as stream:
        bar = ProgressBar(LiveLine(stream))
        bar.start(0, 0)
        assert bar.due == math.inf
        bar.update(FULL, 10)
        bar.note("val 1")
        bar.finish()
        bar.abandon()
    assert (tmp_path / "log").read_text() == ""


def test_a_terminal_that_cannot_redraw_gets_no_bar(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert not LiveLine(terminal.stream).available


def test_a_terminal_that_goes_away_ends_nothing():
    class Gone(io.StringIO):
        def isatty(self):
            return True

        def write(self, text):
            raise OSError(5, "Input/output error")

    line = LiveLine(Gone())
    line.show("text")
    with line.above():
        pass
    line.finish("text")
    assert not LiveLine(io.StringIO()).available
