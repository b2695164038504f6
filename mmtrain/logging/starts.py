"""The starts that logged in a work dir: where each began, which run it belongs to, and their order.

Each start has a log directory named after the local time. That says when to people, but it does not order starts: a
changed time zone or a clock that was set back gives a later start an earlier name. So every start notes a number, one
more than the largest in the work dir.
"""

import json
from pathlib import Path
from typing import NamedTuple

from mmtrain.files import read_bounded, replacing

NOTE = "start_position"
_NOTE_LIMIT = 4096  # bytes


class LogPosition(NamedTuple):
    """A position in a run's logs: the steps before it, and the samples that they consumed, over all ranks.

    One step consumes ``global_batch`` samples, or None if that is unknown; ``mean_batch`` is the mean over an
    epoch, whose last batch may be smaller.
    """

    iteration: int
    samples: int
    global_batch: int | None = None
    mean_batch: float | None = None

    def counts_like(self, other: "LogPosition") -> bool:
        """Whether both count in the same steps; without a batch size, steps were never recounted."""
        return self.global_batch == other.global_batch or not (self.global_batch and other.global_batch)


class Start(NamedTuple):
    """What a start noted. ``run`` is `Manifest.run`; it is "" and ``number`` is 0 in notes of earlier versions."""

    position: LogPosition
    run: str = ""
    number: int = 0


def note_start(log_dir: str | Path, position: LogPosition, *, run: str = "") -> None:
    """Write to ``<log_dir>/vis_data`` where the start that logs there begins, for `cut_logs` of later starts.

    The caller holds the lock of the work dir, so that no other start takes the same number.
    """
    directory = Path(log_dir)
    found = (read_start(other) for other in _log_dirs(directory.parent))
    number = 1 + max((start.number for start in found if start is not None), default=0)
    note = {**position._asdict(), "run": run, "start": number}
    with replacing(directory / "vis_data" / NOTE, durable=False) as aside:
        aside.write_text(json.dumps(note) + "\n", encoding="utf-8")


def read_start(log_dir: Path) -> Start | None:
    """The note of a start; None if it never logged, or was of an early version."""
    try:
        note = json.loads(read_bounded(log_dir / "vis_data" / NOTE, _NOTE_LIMIT))
        position = LogPosition(**{name: note[name] for name in LogPosition._fields if name in note})
        if any(not isinstance(value, int | float) for value in position if value is not None):
            return None
        return Start(position, str(note.get("run", "")), int(note.get("start", 0)))
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


def starts_of(work_dir: str | Path, *, run: str = "", first_log_dir: str = "") -> list[Path]:
    """The log directories of ``run`` in the order of their starts; of all runs if it is "".

    A start that noted no run belongs to it if its directory is not named before ``first_log_dir``.
    """
    own = []
    for path in _log_dirs(Path(work_dir)):
        start = read_start(path) or Start(LogPosition(0, 0))
        belongs = start.run == run if start.run and run else _by_name(path.name) >= _by_name(first_log_dir)
        if belongs:
            own.append((start.number, _by_name(path.name), path))
    return [path for *_, path in sorted(own)]


def _log_dirs(work_dir: Path) -> list[Path]:
    return [path.parent for path in work_dir.glob("*/vis_data")]


def _by_name(log_dir: str) -> tuple[str, int, str]:
    """The second, and the number within it (``20260101_120000_10`` is after ``..._9``)."""
    return log_dir[:15], len(log_dir), log_dir
