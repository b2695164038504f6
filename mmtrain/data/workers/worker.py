"""What runs in a data worker: its start, its signals, its end with the main process, and the reading of a draw."""

import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from torch.utils.data import get_worker_info

from mmtrain import launch
from mmtrain.data.reader import Failure, describe, travels

Reader = Callable[[Any], Any]


class InWorker:
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


_start_failure: list[Failure] = []  # in a worker: what the user's worker_init_fn raised


class WorkerStart:
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
        self._tie = _die_with_parent if threading.current_thread() is threading.main_thread() else _leave_after

    def __call__(self, worker_id: int) -> None:
        self._handle_signals()
        if sys.platform == "linux":
            self._tie(self._parent)
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
        if self._closing.value:
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
        ends = select.poll()
        ends.register(handle, select.POLLIN)
        ends.poll()
        os._exit(1)

    threading.Thread(target=watch, name="mmtrain-parent", daemon=True).start()
