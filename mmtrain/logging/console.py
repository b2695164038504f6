"""The run's logger: console and file, in one format; rank 0 logs."""

import logging
import re
import sys
from pathlib import Path

from mmtrain import dist
from mmtrain.errors import ConfigError
from mmtrain.logging.terminal import LiveLine, live_line
from mmtrain.printable import printable

_COLOUR = re.compile("(\x1b\\[[0-9;]*m)")  # ECMA-48's "select graphic rendition"
LINE_FORMAT = "%(asctime)s - mmtrain - %(levelname)s - %(message)s"
DATE_FORMAT = "%Y/%m/%d %H:%M:%S"


class _PrintableFormatter(logging.Formatter):
    """Escapes control characters, which names in data and checkpoints may have; colours stay."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return "".join(part if _COLOUR.fullmatch(part) else printable(part) for part in _COLOUR.split(text))


class _ConsoleHandler(logging.StreamHandler):
    """Writes to the current ``sys.stderr``, above the progress bar if there is one."""

    def __init__(self, line: LiveLine) -> None:
        logging.Handler.__init__(self)
        self._line = line

    @property
    def stream(self):
        return sys.stderr

    def emit(self, record: logging.LogRecord) -> None:
        try:
            shown = self._line.print_above(self.format(record))
        except Exception:
            self.handleError(record)
        else:
            if not shown:
                super().emit(record)


class _LogFile(logging.FileHandler):
    """A log file whose disk may fill up or disappear: this is reported once, on the terminal, and the run continues."""

    _reported = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._reported:
            self._reported = True
            sys.stderr.write(
                f"cannot write {self.baseFilename} ({error.strerror}); log lines are only printed on the terminal\n"
            )


def make_logger(name: str = "mmtrain", *, level: str | int = "INFO", file: str | Path | None = None) -> logging.Logger:
    """Return the logger ``name`` with exactly one console handler and, on rank 0, one for ``file``.

    Lines read ``2026/11/21 22:00:00 - mmtrain - INFO - ...``, on stderr, without colours. Other ranks log
    warnings and errors only, and write no file. Another call for the same name replaces the logger's handlers. Raises
    ConfigError for an unknown level.
    """
    number = logging.getLevelName(level.upper()) if isinstance(level, str) else level
    if not isinstance(number, int):
        raise ConfigError(f"log_level is {level!r}; expected DEBUG, INFO, WARNING, ERROR or CRITICAL")
    logger = logging.getLogger(name)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(number if dist.is_main() else max(number, logging.WARNING))
    logger.propagate = False  # a root handler of the user would write every line a second time
    handlers: list[logging.Handler] = [_ConsoleHandler(live_line)]
    if file is not None and dist.is_main():
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        handlers.append(_LogFile(file, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(_PrintableFormatter(LINE_FORMAT, DATE_FORMAT))
        logger.addHandler(handler)
    return logger
