import io
import logging
import re

import pytest

from mmtrain.errors import ConfigError
from mmtrain.logging import make_logger


@pytest.fixture
def name():
    yield "mmtrain.test_console"
    logger = logging.getLogger("mmtrain.test_console")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()


def test_lines_go_to_stderr_and_to_the_file_in_one_format(tmp_path, capsys, name):
    logger = make_logger(name, file=tmp_path / "logs" / "run.log")
    logger.info("value %d", 7)
    logger.debug("not told")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"\d{4}/\d\d/\d\d \d\d:\d\d:\d\d - mmtrain - INFO - value 7\n", captured.err)
    assert (tmp_path / "logs" / "run.log").read_text() == captured.err


def test_a_second_logger_of_the_name_writes_a_line_once(tmp_path, capsys, name):
    make_logger(name, file=tmp_path / "a.log")
    make_logger(name, level="warning", file=tmp_path / "b.log").warning("once")
    assert capsys.readouterr().err.count("once") == 1
    assert (tmp_path / "a.log").read_text() == ""


def test_an_unknown_level(name):
    with pytest.raises(ConfigError, match="log_level is 'LOUD'; expected DEBUG"):
        make_logger(name, level="LOUD")


def test_other_ranks_print_only_warnings(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr("mmtrain.dist.is_main", lambda: False)
    logger = make_logger(name, level="DEBUG", file=tmp_path / "run.log")
    logger.info("quiet")
    logger.warning("loud")
    assert "quiet" not in (text := capsys.readouterr().err)
    assert "loud" in text
    assert not (tmp_path / "run.log").exists()


def test_the_stream_is_looked_up_when_a_line_is_written(monkeypatch, name):
    logger = make_logger(name)
    later = io.StringIO()
    monkeypatch.setattr("sys.stderr", later)
    logger.info("there")
    assert later.getvalue().endswith("there\n")


def test_names_cannot_control_the_terminal_and_colours_stay(tmp_path, capsys, name):
    """A name may come from a checkpoint or a file; a colour is what the user's own hook logs."""
    logger = make_logger(name, file=tmp_path / "run.log")
    logger.info("\x1b[1;32mgreen\x1b[0m %s", "w\x1b]0;owned\x07 \x1b[2J back\b\r half \ud800\n\ttwo lines")
    shown = capsys.readouterr().err
    text = "\x1b[1;32mgreen\x1b[0m w\\x1b]0;owned\\x07 \\x1b[2J back\\x08\\r half \\ud800\n\ttwo lines\n"
    assert shown.endswith(text)
    assert (tmp_path / "run.log").read_text() == shown
