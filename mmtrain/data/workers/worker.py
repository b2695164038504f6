"""What runs in a data worker process: its start, its signals, its end, and the loop that answers requests."""

import os
import pickle
import queue
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.multiprocessing  # teaches ForkingPickler to move tensors into shared memory
from torch.utils.data._utils import worker as torch_worker

from mmtrain import launch
from mmtrain.data.reader import SampleError, describe
from mmtrain.data.workers.channel import is_closed, receive_message, send_message
from mmtrain.randomness import seed_generators

Reader = Callable[[Any], Any]


@dataclass(frozen=True)
class WorkerTask:
    """What a worker needs to know; it is pickled where workers are not forked.

    ``parent`` is the process id of the main process. ``from_main_thread`` tells whether the thread that starts the
    worker lives as long as that process.
    """

    reader: Reader
    path: str
    worker_id: int
    num_workers: int
    seed: int
    init_fn: Callable[[int], Any] | None
    parent: int
    from_main_thread: bool


def run_worker(end: socket.socket, task: WorkerTask) -> None:
    """Answer requests in their order until the main process closes its end of the socket.

    Answers are sent from a second thread, so that the next batch is read while the main process is busy with others.
    """
    failure = _set_up(task)
    answers: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
    threading.Thread(target=_send_answers, args=(end, answers), name="mmtrain-answers", daemon=True).start()
    with suppress(EOFError, OSError):  # the main process has closed its end, or is gone
        while True:
            request = pickle.loads(receive_message(end))
            if is_closed(end):
                return
            answers.put(_pickled(failure or task.reader(request), task.path))


def _pickled(data: Any, path: str) -> memoryview:
    """Return a batch as it is sent; tensors are moved into shared memory, and only what refers to them is pickled.

    Done before the next batch is read, which may reuse the memory of this one.
    """
    if isinstance(data, SampleError):
        data = data.packed()
    try:
        return ForkingPickler.dumps(data)
    except Exception as error:
        return ForkingPickler.dumps(
            SampleError(
                f"{path}.dataset: a batch cannot be sent from a data worker ({describe(error)}). Return tensors, "
                "arrays and plain values from the dataset and collate_fn, or set num_workers=0.",
                error,
            ).packed()
        )


def _send_answers(end: socket.socket, answers: "queue.SimpleQueue[memoryview]") -> None:
    try:
        while True:
            send_message(end, answers.get())
    except (BrokenPipeError, ConnectionResetError):
        return  # the main process has closed its end; the main thread of this process notices it as well
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # an answer is lost; without this the main process would wait for it forever


# ---- start -----------------------------------------------------------------------------------------------------------
def _set_up(task: WorkerTask) -> SampleError | None:
    """Prepare this process as torch's DataLoader does; return the error that the user's ``worker_init_fn`` raised.

    The signals by which a scheduler, a terminal or an operator asks a run to save and stop also reach its workers. The
    main process answers them, and needs more batches to reach its next save point, so workers continue until it closes
    them. They end with the main process, also when it is killed: at once on Linux, elsewhere after the current batch.
    """
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):  # a function, because a program that the dataset starts would inherit SIG_IGN
            signal.signal(getattr(signal, name), _ignore)
    launch.answer_with_stacks()
    signal.set_wakeup_fd(-1)  # it may be the main process's
    if sys.platform == "linux":
        # Linux sends the death signal when the thread that forked ends, so only the main thread may rely on it.
        (_die_with_parent if task.from_main_thread else _exit_after)(task.parent)
    torch.set_num_threads(1)
    seed_generators(task.seed)
    _set_worker_info(task)
    if task.init_fn is None:
        return None
    try:
        task.init_fn(task.worker_id)
    except Exception as error:
        return SampleError(f"{task.path}.worker_init_fn raised {describe(error)}", error)
    return None


def _set_worker_info(task: WorkerTask) -> None:
    """Let ``torch.utils.data.get_worker_info()`` return this worker.

    Iterable datasets shard by it, and torch's ``default_collate`` writes batches directly into shared memory where it
    is set. torch has no public function to set it.
    """
    torch_worker._worker_info = torch_worker.WorkerInfo(
        id=task.worker_id,
        num_workers=task.num_workers,
        seed=task.seed,
        dataset=getattr(task.reader, "dataset", None),  # type: ignore[arg-type]
    )


def _ignore(signum: int, frame: Any) -> None:
    """Ignore a signal."""


# ---- end with the main process ---------------------------------------------------------------------------------------
def _die_with_parent(parent: int) -> None:
    """Ask Linux to kill this process when its parent's thread ends (prctl(PR_SET_PDEATHSIG), prctl(2))."""
    import ctypes

    if os.getppid() != parent:
        _exit_after(parent)
        return
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
    except (OSError, AttributeError):
        return
    if os.getppid() != parent:
        os._exit(1)


def _exit_after(pid: int) -> None:
    """End this process when process ``pid`` has ended.

    A worker that a fork server started is not a child of the main process, so the death signal does not serve it.
    """
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:  # killed while this worker was being started
        os._exit(1)
    except (OSError, AttributeError):  # an old kernel or Python
        return

    def watch() -> None:
        ends = select.poll()
        ends.register(handle, select.POLLIN)
        ends.poll()
        os._exit(1)

    threading.Thread(target=watch, name="mmtrain-parent", daemon=True).start()
