"""Data workers that live for the whole run, fed with draws and read in order; or the same without any worker."""

import atexit
import io
import os
import re
import select
import signal
import sys
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import wait
from typing import Any, NoReturn

import torch
from torch.multiprocessing import get_context
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling
from torch.utils.data._utils.pin_memory import pin_memory as pin

from mmtrain.data.options import WorkerOptions
from mmtrain.data.reader import Failure
from mmtrain.data.workers.worker import InWorker, Reader, WorkerStart
from mmtrain.errors import RunError


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
        self._closing: Any = None  # shared with the workers: whether they are to leave
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
        data = self._guarded(next, self._batches)
        if isinstance(data, Failure):
            data.raise_it()
        return self._pending.popleft(), data

    def close(self) -> None:
        """End the workers. They leave after the sample they are at, or are told to stop in it after 5 seconds.

        Where one has ended before, the others are killed: it may have kept a lock that they wait for.
        """
        batches, self._batches, self._loader, self._ends = self._batches, None, None, None
        self._pending.clear()
        if self._at_exit is not None:
            atexit.unregister(self._at_exit)
            self._at_exit = None
        if self._closing is None or os.getpid() != self._owner:
            return
        self._closing.value = True
        if batches is None:  # a worker could not be started: SIGTERM now ends those before it
            return
        if all(worker.is_alive() for worker in batches._workers):
            batches._shutdown_workers()
        else:
            _abandon(batches)
        for worker in batches._workers:
            if worker.is_alive():  # inside a call of C code that no signal handler interrupts
                worker.kill()

    def __del__(self) -> None:
        if self.__dict__.get("_batches") is not None and not sys.is_finalizing():
            self.close()

    def _make_loader(self) -> DataLoader[Any]:
        options = self._options
        context = options.multiprocessing_context
        contexts = get_context(context) if context is None or isinstance(context, str) else context
        # Without a lock: a worker that is killed, or gets a second SIGTERM while it looks, would keep an Event's.
        self._closing = contexts.RawValue("b", False)
        # Without this a worker that does not listen to SIGTERM would hold up the interpreter's exit.
        self._at_exit = partial(_close_at_exit, weakref.ref(self))
        atexit.register(self._at_exit)
        return DataLoader(
            InWorker(self._reader, self._path),  # type: ignore[arg-type]
            batch_sampler=_Feed(self),  # type: ignore[arg-type]
            num_workers=options.num_workers,
            collate_fn=_as_it_is,
            pin_memory=self._pin,
            timeout=options.timeout,
            worker_init_fn=WorkerStart(self._closing, options.worker_init_fn),
            multiprocessing_context=context,
            generator=torch.Generator(),
            prefetch_factor=options.prefetch_factor,
            persistent_workers=True,
        )

    def _take_over_watch(self) -> None:
        """Stop torch from raising about a dead worker wherever the main process happens to be, a save for example.

        Its SIGCHLD handler raises for every worker in a table, from which ours are taken out. They are looked at when
        a batch is taken and while one is waited for; where memory is pinned, in a thread, torch does that every 5
        seconds. Without the handler nothing here may wait for what a dead worker holds.
        """
        batches = self._batches
        signal_handling._remove_worker_pids(id(batches))
        batches._worker_pids_set = False
        batches._workers_done_event = _DoneFlag(batches._workers_done_event)
        if hasattr(select, "poll"):
            sentinels = [worker.sentinel for worker in batches._workers]
            self._ends = _poll(sentinels)
            if not self._pin:  # a pin-memory thread that waits for ever does not matter
                _Pipe(batches._worker_result_queue, sentinels)

    def _guarded(self, function: Callable[[Any], Any], argument: Any) -> Any:
        """Call into torch's loader, and tell its errors about dead workers as a RunError."""
        try:
            if self._ends is not None and self._ends.poll(0):
                raise EOFError("a data worker has ended")
            return function(argument)
        except (RuntimeError, OSError, EOFError) as error:
            self._raise_told(error)

    def _raise_told(self, error: Exception) -> NoReturn:
        workers = getattr(self._batches, "_workers", ())
        told = worker_death(error, path=self._path, workers=workers)
        if told is None and workers and not isinstance(error, RuntimeError):
            # A tensor was being fetched from a worker that is gone: the connection breaks before torch notices.
            ended = wait([worker.sentinel for worker in workers], timeout=1)
            for worker in workers:
                if worker.sentinel in ended:
                    worker.join(1)  # its exit status comes a moment after its sentinel
            told = _dead_worker(self._path, workers)
        if told is None:
            raise error
        raise told from error


class _DoneFlag:
    """torch's event that tells workers to leave, as the main process uses it: without the event's lock.

    Workers take that lock at every draw, so one that is killed may keep it, and the main process would wait for ever.
    """

    def __init__(self, event: Any) -> None:
        self._event = event  # a worker that is being spawned finds its semaphores as long as they are referred to
        self._is_set = False

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        if not self._is_set:
            self._is_set = True
            self._event._flag.release()


class _Pipe:
    """The end of the workers' pipe from which the main process reads: without waiting for a worker that has ended.

    The rest of a message that it began would never come, and no end of the pipe either: the other workers hold it open.
    """

    def __init__(self, queue: Any, sentinels: list[int]) -> None:
        self._pipe = queue._reader.fileno()
        self._ready = _poll([self._pipe, *sentinels])
        queue._poll, queue._reader._recv = self.poll, self._recv

    def poll(self, seconds: float | None = 0.0) -> bool:
        """Return whether there is something to read, after so many seconds at most."""
        ready = dict(self._ready.poll(None if seconds is None else max(seconds, 0.0) * 1000))
        if ready and self._pipe not in ready:
            raise EOFError("a data worker has ended")
        return bool(ready)

    def _recv(self, size: int) -> io.BytesIO:
        buffer = io.BytesIO()
        while buffer.tell() < size and self.poll(None):
            read = os.read(self._pipe, size - buffer.tell())
            if not read:
                raise EOFError("all data workers have ended")
            buffer.write(read)
        return buffer


def _poll(descriptors: Iterable[int]) -> Any:
    poller = select.poll()
    for descriptor in descriptors:
        poller.register(descriptor, select.POLLIN)
    return poller


def _abandon(batches: Any) -> None:
    """Kill the workers of torch's iterator; nothing of it is waited for any more."""
    batches._shutdown = True
    if hasattr(batches, "_pin_memory_thread"):
        batches._pin_memory_thread_done_event.set()
        queue = batches._worker_result_queue
        queue.cancel_join_thread()
        queue.put((None, None))  # wakes the thread, unless it reads what the dead worker began
        batches._pin_memory_thread.join(1)
    for worker in batches._workers:
        worker.kill()
    for worker in batches._workers:
        worker.join(1)


class _Feed:
    """The draws as torch's loader takes them: a batch sampler whose every element is a draw."""

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = weakref.proxy(pool)

    def __iter__(self) -> Iterator[Any]:
        pending, draws = self._pool._pending, self._pool._draws
        for draw in draws:
            pending.append(draw)
            yield draw


def _as_it_is(data: Any) -> Any:
    return data


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence two warnings of starting workers that a run's own notices say better, or that cannot be helped."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
        yield


def crowding(options: WorkerOptions, path: str) -> list[str]:
    """Return the notice to report at start when there are more workers than processors."""
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
