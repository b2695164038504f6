import io
import math
import re

import pytest
from pseudo_terminal import PseudoTerminal
from rich.console import Console

from mmtrain.logging import LiveLine, ProgressBar, Shown, make_logger
from mmtrain.logging import console as console_module
from mmtrain.logging.progress_bar import REFRESH, BarLine

FULL = Shown(done=1234, total=10000, loss=2.34567, lr=1e-3, rate=12345.6, wait=0.031, eta=754.0)


def render(shown, columns, encoding="utf-8"):
    """The line at a width of ``columns``, as text."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=file, width=columns, color_system="truecolor", force_terminal=True, _environ={}).print(
        BarLine(shown), end=""
    )
    file.flush()
    return re.sub(r"\x1b\[[\d;]*m", "", file.buffer.getvalue().decode(encoding))


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("CI", raising=False)
    made = PseudoTerminal()
    yield made
    made.close()


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_the_line_at_80_columns():
    text = render(FULL, 80)
    assert re.fullmatch(r" 12% ╸━{7}  1234/10000 loss 2\.346 lr 1\.0e-03 12\.3k smp/s data 3% eta 0:12:34", text), text
    assert len(text) == 79


@pytest.mark.parametrize("columns", [10, 40, 60, 80, 100, 200])
def test_no_line_is_wider_than_the_terminal(columns):
    for shown in (FULL, Shown(done=10**9, total=10**9, eta=9e6, note="val 12"), Shown(done=3), Shown(0, 10)):
        assert "\n" not in render(shown, columns)
        assert len(render(shown, columns)) < columns


def test_a_wide_terminal_has_full_words_and_the_bar():
    text = render(FULL, 140)
    assert re.search(r" 12% ━{4}╸━{35}  1234/10000 ", text), text
    assert "12.3k samples/s" in text
    assert render(FULL, 140, encoding="ascii").isascii()


def test_an_unknown_length_has_no_percent_and_no_bar():
    assert render(Shown(done=7, loss=1.0, lr=0.1, rate=3.25), 80) == "7 loss 1 lr 1.0e-01 3.2 smp/s data - eta -"


@pytest.mark.parametrize(
    ("rate", "text"),
    [(0.5, "0.5"), (99.94, "99.9"), (1234, "1234"), (56789, "56.8k"), (5e6, "5.0M"), (2e9, "2.0G")],
)
def test_rates_are_short(rate, text):
    assert f" {text} smp/s" in render(Shown(done=1, rate=rate), 80)


def test_log_lines_and_the_bar_do_not_mix(terminal, monkeypatch):
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
            assert len(terminal.lines[-1]) > 60  # the bar is below the line again
    bar.update(Shown(done=50, total=50, loss=0.02, lr=0.1, wait=0.0), 400)
    bar.finish()
    logger.info("after")
    screen = [re.sub(r"^.* - mmtrain - INFO - ", "", text) for text in terminal.lines]
    assert screen[:3] == ["before", "iteration 20", "iteration 40"]
    assert re.fullmatch(r"100% ━+ 50/50 loss 0\.02 lr 1\.0e-01 160 smp/s data 0% eta 0:00:00", screen[3]), screen[3]
    assert screen[4:] == ["after", ""]
    assert terminal.screen.widest < terminal.screen.columns
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
    assert not any(terminal.lines)


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
    assert re.match(r" 91% val 3·+  910/1000 ", terminal.lines[-1])
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


@pytest.mark.parametrize("variable", [{"TERM": "dumb"}, {"CI": "true"}])
def test_a_terminal_that_cannot_redraw_and_ci_get_no_bar(terminal, monkeypatch, variable):
    assert LiveLine(terminal.stream).available
    for name, value in variable.items():
        monkeypatch.setenv(name, value)
    assert not LiveLine(terminal.stream).available


def test_a_long_log_line_is_not_cut(terminal):
    line = LiveLine(terminal.stream)
    line.show(BarLine(FULL))
    text = "path/" * 40
    assert line.print_above(f"{text} [bold]{{}}")
    line.clear()
    assert "".join(terminal.lines) == f"{text} [bold]{{}}"
    assert not line.print_above("no bar")


def test_the_bar_follows_a_resize(terminal):
    line = LiveLine(terminal.stream)
    line.show(BarLine(FULL))
    terminal.resize(140)
    line.finish(BarLine(FULL))
    assert len(terminal.lines[0]) > 100


def test_the_cursor_stays_visible(terminal):
    """A process that is killed could not show it again."""
    line = LiveLine(terminal.stream)
    line.show(BarLine(FULL))
    assert terminal.lines
    assert terminal.raw.rfind(b"\x1b[?25h") > terminal.raw.rfind(b"\x1b[?25l")
    line.clear()


def test_a_closed_terminal_does_not_end_the_run():
    class Gone(io.StringIO):
        def isatty(self):
            return True

        def write(self, text):
            raise OSError(5, "Input/output error")

    line = LiveLine(Gone())
    line.show(BarLine(FULL))
    line.print_above("text")
    line.finish(BarLine(FULL))
    assert not LiveLine(io.StringIO()).available
