"""A group of data worker processes, each with its own socket: requests go out, answers come back in order."""

import os
import pickle
import queue
import select
import signal
import socket
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait as wait_for_any
from multiprocessing.util import register_after_fork
from typing import Any, NoReturn

import torch
from torch.multiprocessing import get_context
from torch.utils.data._utils.pin_memory import pin_memory

from mmtrain.data.options import WorkerOptions
from mmtrain.data.workers.channel import receive_message, send_message
from mmtrain.data.workers.worker import Reader, WorkerTask, run_worker
from mmtrain.errors import RunError

CLOSE_SECONDS = 5.0  # time that all workers together get to finish their current batches
KILL_SECONDS = 1.0  # time in which killed workers end, if the system lets them


class WorkerGroup:
    """Worker processes that call ``reader(request)``.

    Nothing is shared among workers, so one that is killed at any moment holds no lock and leaves no message half sent
    that another process waits for. Waiting for a worker always watches the ends of all workers as well.

    With ``pin`` a thread receives the answers and copies them into pinned memory.

    Raises:
        OSError: a worker cannot be started; those before it are ended.
    """

    def __init__(self, reader: Reader, options: WorkerOptions, *, path: str, pin: bool) -> None:
        self._path = path
        self._timeout = options.timeout
        self._workers: list[Any] = []
        self._ends: list[socket.socket] = []
        self._next_worker = 0
        self._asked: deque[int] = deque()  # the workers whose answers are still to come, oldest first
        self._pinner: _Pinner | None = None
        try:
            self._start(reader, options)
        except BaseException:
            self.close()
            raise
        if pin:
            self._pinner = _Pinner(self._receive_from)

    def _start(self, reader: Reader, options: WorkerOptions) -> None:
        context = options.multiprocessing_context
        if context is None or isinstance(context, str):
            context = get_context(context)
        seed = int(torch.empty((), dtype=torch.int64).random_(generator=torch.Generator()).item())  # as DataLoader's
        in_main_thread = threading.current_thread() is threading.main_thread()
        for number in range(options.num_workers):
            task = WorkerTask(
                reader, self._path, number, options.num_workers, seed + number, options.worker_init_fn, os.getpid(),
                in_main_thread,
            )  # fmt: skip
            ours, theirs = socket.socketpair()
            self._ends.append(ours)
            ours.setblocking(False)
            register_after_fork(ours, socket.socket.close)  # else no worker would notice that this process is gone
            worker = context.Process(target=run_worker, args=(theirs, task), daemon=True)
            with theirs, _without_fork_warning():
                worker.start()
            self._workers.append(worker)

    def ask(self, request: Any) -> None:
        """Send a request to the next worker; workers take turns."""
        number, self._next_worker = self._next_worker, (self._next_worker + 1) % len(self._workers)
        with self._explained():
            send_message(self._ends[number], pickle.dumps(request), self._wait)
        self._asked.append(number)
        if self._pinner is not None:
            self._pinner.wanted.put(number)

    def answer(self) -> Any:
        """Return the answer to the oldest request that has not been answered.

        Raises:
            RunError: a worker has ended, or the answer takes longer than ``timeout`` seconds.
        """
        self.check()
        deadline = time.monotonic() + self._timeout if self._timeout else None
        number = self._asked.popleft()
        with self._explained():
            if self._pinner is not None:
                return self._pinner.get(deadline)
            return self._receive_from(number, deadline)

    def restart_turns(self) -> None:
        """Let the next request go to the first worker."""
        self._next_worker = 0

    def check(self) -> None:
        """Raise RunError if a worker has ended."""
        if any(_poll([worker.sentinel for worker in self._workers], seconds=0)):
            self._raise_ended(EOFError("a data worker has ended"))

    def close(self) -> None:
        """End the workers. They finish their current batch first; after 5 seconds they are killed."""
        for end in self._ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # not only closed: workers forked later hold copies of it
        if self._pinner is not None:
            self._pinner.stop()
        deadline = time.monotonic() + CLOSE_SECONDS
        for worker in self._workers:
            worker.join(max(0.0, deadline - time.monotonic()))
        left = [worker for worker in self._workers if worker.is_alive()]
        for worker in left:
            worker.kill()
        deadline = time.monotonic() + KILL_SECONDS
        for worker in left:
            worker.join(max(0.0, deadline - time.monotonic()))
        for end in self._ends:
            end.close()

    def _receive_from(self, number: int, deadline: float | None = None) -> Any:
        def wait(end: socket.socket, event: int) -> None:
            self._wait(end, event, deadline)

        return pickle.loads(receive_message(self._ends[number], wait))

    def _wait(self, end: socket.socket, event: int, deadline: float | None = None) -> None:
        """Wait until a socket is ready. Raises EOFError if a worker ends before, `queue.Empty` at the deadline."""
        seconds = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = _poll([worker.sentinel for worker in self._workers], seconds, end.fileno(), event)
        if end.fileno() in ready:
            return
        if not ready:
            raise queue.Empty
        raise EOFError("a data worker has ended")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what a broken connection raises into a RunError that says which worker ended and how."""
        try:
            yield
        except queue.Empty:
            raise RunError(
                f"{self._path}.timeout: no batch arrived within {self._timeout} seconds. A sample takes longer than "
                "that, or the storage does not respond."
            ) from None
        except (OSError, EOFError) as error:
            self._raise_ended(error)

    def _raise_ended(self, error: Exception) -> NoReturn:
        # The connection breaks a moment before the process has ended, and its exit status comes a moment later.
        ended = wait_for_any([worker.sentinel for worker in self._workers], timeout=1)
        for worker in self._workers:
            if worker.sentinel in ended:
                worker.join(1)
                raise RunError(_describe_end(self._path, worker.pid, worker.exitcode)) from error
        raise error


class _Pinner:
    """A thread that receives answers and copies them into pinned memory while the main thread computes."""

    def __init__(self, receive: Callable[[int], Any]) -> None:
        self.wanted: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._receive = receive
        self._ready: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._device = torch.accelerator.current_device_index()
        self._thread = threading.Thread(target=self._run, name="mmtrain-pin-memory", daemon=True)
        self._thread.start()

    def get(self, deadline: float | None) -> Any:
        """Return the next answer. Raises what receiving it raised, or `queue.Empty` at the deadline."""
        data, error = self._ready.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
        if error is not None:
            raise error
        return data

    def stop(self) -> None:
        """End the thread; its sockets must be shut down before, so that it does not wait for a worker."""
        self.wanted.put(None)
        self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        torch.accelerator.set_device_index(self._device)  # a new thread begins at device 0
        while (number := self.wanted.get()) is not None:
            try:
                self._ready.put((pin_memory(self._receive(number)), None))
            except BaseException as error:
                self._ready.put((None, error))
                return


def _poll(sentinels: list[int], seconds: float | None, descriptor: int = -1, event: int = 0) -> dict[int, int]:
    """Wait until a worker has ended or the descriptor is ready; return what is ready, nothing after ``seconds``."""
    poller = select.poll()
    for sentinel in sentinels:
        poller.register(sentinel, select.POLLIN)
    if descriptor >= 0:
        poller.register(descriptor, event)
    return dict(poller.poll(None if seconds is None else seconds * 1000))


@contextmanager
def _without_fork_warning() -> Iterator[None]:
    """Silence Python's warning about fork in a process with threads: torch starts threads in every process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
        yield


def _describe_end(path: str, pid: int, status: int) -> str:
    how = f"exited with status {status}"
    if status < 0:
        how = f"was killed by signal {-status} ({signal.Signals(-status).name})"
    return (
        f"{path}.num_workers: the data worker with pid {pid} {how}. The system may be out of memory or of shared "
        "memory (/dev/shm): use fewer workers or a smaller prefetch_factor, or num_workers=0 to see a dataset's error."
    )
