"""Where this process and its data workers are: their Python stacks, and the one function to name."""

import faulthandler
import multiprocessing
import os
import re
import signal
import sys
import sysconfig
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

_WORKER_FILE = "mmtrain-stacks"
_PACKAGE = Path(__file__).resolve().parents[1]
_STANDARD = sysconfig.get_paths()["stdlib"]
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$')
_WORKERS = _PACKAGE / "data" / "workers"
_WRAPPERS = (_PACKAGE / "dist.py", _PACKAGE / "checkpoint" / "topology", _WORKERS)
_SECONDS = 2.0  # how long data workers get to write theirs


class Frame(NamedTuple):
    """One call on a stack."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.function} ({Path(self.file).name}:{self.line})"


@dataclass(frozen=True, slots=True)
class RankLocation:
    """Where a rank is: iterations done, the function to name, and whether it waits for other ranks there."""

    rank: int
    iteration: int
    place: str
    waits: bool

    def __str__(self) -> str:
        return f"rank {self.rank} after {self.iteration} iterations in {self.place}"


def write_stacks(file: IO[str]) -> list[tuple[str, str]]:
    """Write the stacks of all threads, then those of the data workers; return the latter by the workers' names.

    Works while the main thread is inside C code, unless that holds the GIL.
    """
    faulthandler.dump_traceback(file=file, all_threads=True)
    workers = list(_stacks_of_workers())
    for name, text in workers:
        file.write(f"\n{name}\n{text}")
    file.flush()
    return workers


def locate(rank: int, iteration: int, workers: Iterable[tuple[str, str]] = ()) -> RankLocation:
    """Where the main thread is. A main thread that waits for a batch is where its data worker is."""
    frame, library = _worth_naming(_main_thread())
    place = str(frame)
    if any(_WORKERS in Path(inner.file).parents for inner in library):
        for name, text in workers:
            inside = _reading(text)
            if inside is not None:
                place = f"{inside} of {name}"
                break
    return RankLocation(rank, iteration, place, any(map(_waits, library)))


def _main_thread() -> list[Frame]:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    frames = []
    while frame is not None:
        frames.append(Frame(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return frames


def _worth_naming(frames: list[Frame]) -> tuple[Frame | None, list[Frame]]:
    """The innermost call of the user's code, else of a package's, else of ours; and torch's calls inside of it."""
    library: list[Frame] = []
    package: Frame | None = None
    for frame in frames:
        if _is_library(frame):
            library.append(frame)
        elif _PACKAGE in Path(frame.file).parents:
            return package or frame, library
        elif "site-packages" in frame.file:
            package = package or frame
        else:
            return frame, library
    return package or (frames[0] if frames else None), library


def _is_library(frame: Frame) -> bool:
    """torch, Python's own, and our wrappers of collectives and of workers, which say less than their callers."""
    own = frame.file.startswith(_STANDARD) and "site-packages" not in frame.file and "dist-packages" not in frame.file
    path = Path(frame.file)
    is_wrapper = any(wrapper == path or wrapper in path.parents for wrapper in _WRAPPERS)
    return own or frame.file.startswith("<") or "/torch/" in frame.file or is_wrapper


def _waits(frame: Frame) -> bool:
    """Whether a call of torch's waits for other ranks; in a backward it is the wrapper's exchange of gradients."""
    in_collective = "/torch/distributed/" in frame.file or frame.file.endswith("/torch/nn/parallel/distributed.py")
    return in_collective or frame.function == "_engine_run_backward"


# ---- data workers ----------------------------------------------------------------------------------------------------
def answer_with_stacks() -> None:
    """In a data worker: let SIGUSR2 write its stacks where the main process finds them, also from inside C code.

    Linux only; elsewhere the signal keeps its handler and the main process reads nothing.
    """
    if hasattr(os, "memfd_create"):
        faulthandler.register(signal.SIGUSR2, file=os.memfd_create(_WORKER_FILE), all_threads=True)


def _stacks_of_workers() -> Iterator[tuple[str, str]]:
    files = {}
    for child in multiprocessing.active_children():
        path = _file_of(child.pid or 0)
        if path is not None:
            files[f"data worker process {child.pid}"] = path
            with suppress(OSError):
                os.kill(child.pid or 0, signal.SIGUSR2)
    _wait_until_written(list(files.values()))
    for name, path in files.items():
        with suppress(OSError):
            yield name, path.read_text(encoding="utf-8", errors="replace")


def _wait_until_written(files: list[Path]) -> None:
    """Return when all files have something in them that no longer grows, or when the time is over."""
    deadline, before = time.monotonic() + _SECONDS, [0] * len(files)
    while files and time.monotonic() < deadline:
        time.sleep(0.1)
        now = [_size(path) for path in files]
        if now == before and all(now):
            return
        before = now


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _file_of(pid: int) -> Path | None:
    with suppress(OSError):
        for path in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                if _WORKER_FILE in str(path.readlink()):
                    return path
    return None


def _reading(text: str) -> Frame | None:
    """The user's function that a worker is in; None for a worker that waits for work."""
    frames: list[Frame] = []
    for line in text.splitlines():
        match = _FRAME.match(line)
        if match is None:
            frames = []  # another thread
        elif match[3] == "run_worker":
            frame, _ = _worth_naming(frames)
            return frame if frame is not None and not _is_library(frame) else None
        else:
            frames.append(Frame(match[1], int(match[2]), match[3]))
    return None
