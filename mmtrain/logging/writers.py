"""Where scalars are written: the console, JSON lines, and MMEngine's visualizer backends."""

import errno
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from mmtrain.logging.visualizer import scalar_targets

# Lines kept to be written later when the disk refuses them: some hours of a run at the default interval.
KEPT_LINES = 10_000


class ScalarWriter(Protocol):
    """Receives the scalars of each log line. Only rank 0 has writers; no method raises for a full disk.

    ``kind`` is "train", "val", "test" or "save"; ``step`` the iterations done; ``text`` the line for people, or None.
    """

    def write(self, scalars: Mapping[str, Any], step: int, *, kind: str = "train", text: str | None = None) -> None: ...

    def flush(self) -> None:
        """Pass everything to the operating system: what is flushed survives a SIGKILL."""

    def close(self) -> None:
        """Flush and release; a later `write` opens again."""


class ConsoleWriter:
    """Gives the text of a line to the run's logger."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def write(self, scalars: Mapping[str, Any], step: int, *, kind: str = "train", text: str | None = None) -> None:
        if text is not None:
            self._logger.info("%s", text)

    def flush(self) -> None:
        """Every line is written already."""

    def close(self) -> None:
        """The logger belongs to the run."""


class JsonLinesWriter:
    """One JSON object a line: ``{"mode": "train", "step": 50, "epoch": 1, "iter": 50, "lr": ..., "loss": ...}``.

    Floats are written by ``repr``, so they read back bit-for-bit; NaN and infinities as ``NaN`` and ``Infinity``. A
    line is one write to a file opened for appending: it is complete or absent, whatever stops the process. When the
    disk refuses a line, it is kept and written with the next one.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: int | None = None
        self._waiting: list[bytes] = []

    def write(self, scalars: Mapping[str, Any], step: int, *, kind: str = "train", text: str | None = None) -> None:
        line = {"mode": kind, "step": step, **{name: plain(value) for name, value in scalars.items() if name != "step"}}
        self._waiting.append(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self.flush()

    def flush(self) -> None:
        if not self._waiting:
            return
        try:
            self._append(b"".join(self._waiting))
        except OSError as error:
            if len(self._waiting) == 1:  # once for each time that the disk starts to refuse
                logging.getLogger("mmtrain").warning("cannot write %s (%s); will try again", self.path, error.strerror)
            del self._waiting[:-KEPT_LINES]
            if error.errno == errno.ESTALE:  # of this handle for good
                self._close_file()
        else:
            self._waiting = []

    def close(self) -> None:
        self.flush()
        self._close_file()

    def _close_file(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                os.close(self._file)
            self._file = None

    def _append(self, data: bytes) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_CLOEXEC", 0), 0o644)
        size = os.fstat(self._file).st_size
        written = os.write(self._file, data)
        if written < len(data):  # the disk is full: remove the incomplete part
            os.ftruncate(self._file, size)
            raise OSError(28, os.strerror(28), str(self.path))


class VisualizerWriter:
    """Gives scalars to the backends of an MMEngine Visualizer (TensorBoard, Weights & Biases, ...).

    A metric of validation or test with a plain name gets its kind in front (``val/loss``), so that it is not drawn into
    the training curve; names with a ``/`` (``coco/bbox_mAP``) are not changed. LocalVisBackend gets no scalars: it
    would write them a second time into the file of `JsonLinesWriter`.

    A backend whose disk fails gets no more scalars, which is reported once: TensorBoard's writer does not recover.
    """

    def __init__(self, visualizer: Any) -> None:
        self._visualizer = visualizer
        self._failed: list[Any] = []

    def write(self, scalars: Mapping[str, Any], step: int, *, kind: str = "train", text: str | None = None) -> None:
        targets = self._targets()
        if not targets:
            return
        named: dict[str, float] = {}
        evaluated = kind in ("val", "test")
        for name, value in scalars.items():
            number = plain(value)
            if (
                name == "step"
                or not isinstance(number, (int, float))
                or (kind != "train" and name in ("epoch", "iter"))
            ):
                continue  # training draws the curves of epoch and iter; this would be a second point at the step
            named[f"{kind}/{name}" if evaluated and "/" not in name else name] = number
        for target in targets:
            with self._reporting(target):
                target.add_scalars(dict(named), step=step)

    def flush(self) -> None:
        for target in self._targets():
            with self._reporting(target):
                flush = getattr(getattr(target, "experiment", None), "flush", None)
                if callable(flush):
                    flush()

    def close(self) -> None:
        for target in self._targets():
            with self._reporting(target):
                target.close()

    def _targets(self) -> list[Any]:
        return [target for target in scalar_targets(self._visualizer) if target not in self._failed]

    @contextmanager
    def _reporting(self, target: Any) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._failed.append(target)
            logging.getLogger("mmtrain").warning(
                "%s cannot write (%s); it gets no more scalars in this run, scalars.json has them all",
                type(target).__name__, error.strerror or error,
            )  # fmt: skip


def plain(value: Any) -> Any:
    """A value as JSON knows it: tensors and arrays become numbers or lists, other values become text."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if callable(getattr(value, "tolist", None)):  # torch and numpy, without importing either
        return value.tolist()
    return str(value)
