"""Data workers that live for the whole run, fed with draws and read in order; or the same without any worker."""

import atexit
import os
import re
import select
import signal
import sys
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import wait
from typing import Any, NoReturn

import torch
from torch.multiprocessing import get_context
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data._utils import signal_handling
from torch.utils.data._utils.pin_memory import pin_memory as pin

from mmtrain import launch
from mmtrain.data.options import WorkerOptions
from mmtrain.data.reading import Failure, describe, travels
from mmtrain.errors import RunError

Reader = Callable[[Any], Any]


class WorkerPool:
    """Gives, draw by draw and in order, what ``reader(draw)`` returns.

    With ``num_workers=0`` the reader is called here, without any layer of torch in between. With workers it is called
    in them, up to ``prefetch_factor`` draws ahead for each, and the main process's global generators are never drawn
    from. `start` drops whatever was under way and goes on with other draws in the same workers.

    ``reader.dataset`` is what ``torch.utils.data.get_worker_info().dataset`` shows to the user's code.
    """

    def __init__(self, reader: Reader, options: WorkerOptions, *, path: str) -> None:
        self._reader = reader
        self._options = options
        self._path = path
        wanted = torch.cuda.is_available() if options.pin_memory is None else options.pin_memory
        self._pin = bool(wanted) and torch.accelerator.is_available()
        self._draws: Iterator[Any] = iter(())
        self._pending: deque[Any] = deque()  # draws that the workers hold, oldest first
        self._loader: DataLoader[Any] | None = None
        self._batches: Any = None
        self._ends: Any = None  # a poll object that is ready when a worker has ended
        self._closing: Any = None
        self._at_exit: Callable[[], None] | None = None
        self._owner = os.getpid()

    def start(self, draws: Iterable[Any]) -> None:
        """Go on with these draws; nothing that was read for the former ones is given any more."""
        self._draws = iter(draws)
        if self._options.num_workers == 0:
            return
        self._pending.clear()
        with _quiet():
            if self._loader is None:
                self._loader = self._make_loader()
                self._batches = self._guarded(iter, self._loader)
                self._take_over_watch()
            else:
                # Iterating over a loader with persistent workers again empties its queues and keeps the processes.
                self._guarded(iter, self._loader)

    def take(self) -> tuple[Any, Any]:
        """Return the next draw and what was read for it.

        Raises:
            StopIteration: the draws have come to their end.
            RunError: the reader failed, or a worker died.
        """
        if self._options.num_workers == 0:
            draw = next(self._draws)
            data = self._reader(draw)
            if isinstance(data, Failure):
                data.raise_it()
            return draw, (pin(data) if self._pin else data)
        if self._ends is not None and self._ends.poll(0):
            self._raise_told(EOFError("a data worker has ended"))
        data = self._guarded(next, self._batches)
        if isinstance(data, Failure):
            data.raise_it()
        return self._pending.popleft(), data

    def close(self) -> None:
        """End the workers. They leave after the sample they are at, after 5 seconds at the latest."""
        batches, self._batches, self._loader, self._ends = self._batches, None, None, None
        self._pending.clear()
        if self._at_exit is not None:
            atexit.unregister(self._at_exit)
            self._at_exit = None
        if batches is None or os.getpid() != self._owner:
            return
        self._closing.set()
        with suppress(RuntimeError):  # a worker that had died before
            batches._shutdown_workers()
        for worker in batches._workers:
            if worker.is_alive():  # inside a call of C code that no signal handler interrupts
                worker.kill()

    def __del__(self) -> None:
        if self.__dict__.get("_batches") is not None and not sys.is_finalizing():
            self.close()

    def _make_loader(self) -> DataLoader[Any]:
        options = self._options
        context = options.multiprocessing_context
        self._closing = (get_context(context) if context is None or isinstance(context, str) else context).Event()
        # Without this a worker that does not listen to SIGTERM would hold up the interpreter's exit.
        self._at_exit = partial(_close_at_exit, weakref.ref(self))
        atexit.register(self._at_exit)
        return DataLoader(
            _InWorker(self._reader, self._path),  # type: ignore[arg-type]
            batch_sampler=_Feed(self),  # type: ignore[arg-type]
            num_workers=options.num_workers,
            collate_fn=_as_it_is,
            pin_memory=self._pin,
            timeout=options.timeout,
            worker_init_fn=_WorkerStart(self._closing, options.worker_init_fn),
            multiprocessing_context=context,
            generator=torch.Generator(),
            prefetch_factor=options.prefetch_factor,
            persistent_workers=True,
        )

    def _take_over_watch(self) -> None:
        """Stop torch from raising about a dead worker wherever the main process happens to be, a save for example.

        Its SIGCHLD handler raises for every worker in a table, from which ours are taken out. They are looked at when
        a batch is taken, and by torch every 5 seconds while one is waited for.
        """
        signal_handling._remove_worker_pids(id(self._batches))
        self._batches._worker_pids_set = False
        if hasattr(select, "poll"):
            self._ends = select.poll()
            for worker in self._batches._workers:
                self._ends.register(worker.sentinel, select.POLLIN)

    def _guarded(self, function: Callable[[Any], Any], argument: Any) -> Any:
        """Call into torch's loader, and tell its errors about dead workers as a RunError."""
        try:
            return function(argument)
        except (RuntimeError, OSError, EOFError) as error:
            self._raise_told(error)

    def _raise_told(self, error: Exception) -> NoReturn:
        workers = getattr(self._batches, "_workers", ())
        told = worker_death(error, path=self._path, workers=workers)
        if told is None and not isinstance(error, RuntimeError):
            # A tensor was being fetched from a worker that is gone: the connection breaks before torch notices.
            ended = wait([worker.sentinel for worker in workers], timeout=1)
            for worker in workers:
                if worker.sentinel in ended:
                    worker.join(1)  # its exit status comes a moment after its sentinel
            told = _dead_worker(self._path, workers)
        if told is None:
            raise error
        raise told from error


class _Feed:
    """The draws as torch's loader takes them: a batch sampler whose every element is a draw."""

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = weakref.proxy(pool)

    def __iter__(self) -> Iterator[Any]:
        pending, draws = self._pool._pending, self._pool._draws
        for draw in draws:
            pending.append(draw)
            yield draw


class _InWorker:
    """The reader as torch's loader takes it: a data set that reads a whole batch at a time."""

    def __init__(self, reader: Reader, path: str) -> None:
        self.reader = reader
        self._path = path
        self._checked = False

    def __getitems__(self, draw: Any) -> Any:
        if _start_failure:
            failure = _start_failure[0]
            return Failure(f"{self._path}.worker_init_fn: {failure.sentence}", failure.error).packed()
        data = self.reader(draw)
        if isinstance(data, Failure):
            return data.packed()
        if not self._checked:
            self._checked = True
            failed = travels(data, self._path)
            if failed is not None:
                return failed.packed()
        return data


def _as_it_is(data: Any) -> Any:
    return data


_start_failure: list[Failure] = []  # in a worker: what the user's worker_init_fn raised


class _WorkerStart:
    """What a worker does first.

    The signals by which a scheduler, a terminal or an operator asks a run to save and stop reach its workers as well.
    The main process answers them and still needs batches to reach its next save point, so workers go on until it
    closes them. They end with the main process, also when that is killed: on Linux at once, elsewhere when torch's
    watchdog looks, within 5 seconds.
    """

    def __init__(self, closing: Any, user_function: Callable[[int], Any] | None) -> None:
        self._closing = closing
        self._user_function = user_function
        self._parent = os.getpid()
        # The death signal follows the thread that forked, so it is safe from the main thread only.
        self._tied = sys.platform == "linux" and threading.current_thread() is threading.main_thread()

    def __call__(self, worker_id: int) -> None:
        self._handle_signals()
        if self._tied:
            _die_with_parent(self._parent)
        info = get_worker_info()
        if info is not None:
            wrapper: Any = info.dataset
            object.__setattr__(info, "dataset", getattr(wrapper.reader, "dataset", None))  # as the user knows it
        _start_failure.clear()
        if self._user_function is not None:
            try:
                self._user_function(worker_id)
            except Exception as error:
                _start_failure.append(Failure(f"it failed with {describe(error)}", error))

    def _handle_signals(self) -> None:
        # Functions, not SIG_IGN: a program that the data set starts would inherit that.
        for name in ("SIGINT", "SIGUSR1", "SIGUSR2"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), _go_on)
        launch.answer_with_stacks()
        signal.signal(signal.SIGTERM, self._terminate)
        signal.set_wakeup_fd(-1)  # it may be the main process's

    def _terminate(self, signum: int, frame: Any) -> None:
        if self._closing.is_set():
            os._exit(0)


def _go_on(signum: int, frame: Any) -> None:
    """Ignore a signal."""


def _die_with_parent(parent: int) -> None:
    """Ask Linux to kill this process when its parent's thread ends (prctl(PR_SET_PDEATHSIG), prctl(2))."""
    import ctypes

    if os.getppid() != parent:
        _leave_after(parent)
        return
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
    except (OSError, AttributeError):
        return
    if os.getppid() != parent:
        os._exit(1)


def _leave_after(pid: int) -> None:
    """End this process when process ``pid`` has ended.

    A worker that a fork server started is no child of the main process, and it holds the server's pipe open, so neither
    the server nor torch's watchdog would ever notice that the main process was killed.
    """
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:  # killed while this worker was being started
        os._exit(1)
    except (OSError, AttributeError):  # an old kernel or Python
        return

    def watch() -> None:
        select.select([handle], [], [])
        os._exit(1)

    threading.Thread(target=watch, name="mmtrain-parent", daemon=True).start()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence two warnings of starting workers that a run's own remarks say better, or that cannot be helped."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
        yield


def crowding(options: WorkerOptions, path: str) -> list[str]:
    """Return the remark to report at start when there are more workers than processors."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if options.num_workers <= cores:
        return []
    return [f"{path}.num_workers: {options.num_workers} workers on {cores} processor(s); fewer may be faster"]


def _close_at_exit(pool: "weakref.ref[WorkerPool]") -> None:
    alive = pool()
    if alive is not None:
        alive.close()


_KILLED = re.compile(
    r"DataLoader worker \(pid\(?s?\)? ?([\d, ]+)\) (?:is killed by signal: ([\w ]+)|exited unexpectedly)"
)


def worker_death(error: BaseException, *, path: str = "dataloader", workers: Iterable[Any] = ()) -> RunError | None:
    """Return the RunError for an exception of torch that means a data worker died or is late, or None.

    For a loader that the user has built torch raises it from a signal handler, so it can surface anywhere in the main
    process; whoever catches an unknown RuntimeError can ask here. Our own workers are told where a batch is taken.
    """
    cause: BaseException | None = error
    while cause is not None:
        message = str(cause)
        if "DataLoader timed out" in message:
            return RunError(f"{path}.timeout: {message}; a sample takes longer than that, or the storage hangs")
        found = _KILLED.search(message)
        if found:
            return _dead_worker(path, workers) or _death_told(found, path)
        cause = cause.__cause__ or cause.__context__
    return None


def _death_told(found: "re.Match[str]", path: str) -> RunError:
    pid = found[1].strip()
    return _death_error(path, pid, f"was killed by signal ({found[2].strip()})" if found[2] else "left without a word")


def _dead_worker(path: str, workers: Iterable[Any]) -> RunError | None:
    """Return the error for the first worker that has ended otherwise than it should, or None."""
    for worker in workers:
        code = worker.exitcode
        if code is not None:
            killed = f"was killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else ""
            return _death_error(path, worker.pid, killed or f"left with status {code}")
    return None


def _death_error(path: str, pid: Any, how: str) -> RunError:
    return RunError(
        f"{path}.num_workers: the data worker with pid {pid} {how}; the system may be out of memory or of shared "
        "memory (/dev/shm): use fewer workers or a smaller prefetch_factor, or num_workers=0 to see a data set's error"
    )
