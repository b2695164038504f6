"""A save under way, as its caller sees it."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mmtrain.checkpoint.write.staging import Staged
from mmtrain.errors import CheckpointError


class PendingSave:
    """A save under way. All fields are final once `done`.

    ``stall_seconds``: how long training has waited for it; ``total_seconds``: the time until it was durable; ``bytes``:
    the size of the checkpoint; ``error``: why it failed; ``notices``: what did not work but costs no checkpoint (the
    pointer, a deletion); ``reported``: whether the error was raised somewhere.

    A save counts as failed until `succeed` is called: a writer that ends in any way without that has failed.
    """

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.path = path
        self.stall_seconds = 0.0
        self.total_seconds = 0.0
        self.bytes = 0
        self.error: CheckpointError | None = save_error(path, RuntimeError("its writer ended without a result"))
        self.notices: list[str] = []
        self.reported = False
        self._staged: Staged | None = None
        self._thread: threading.Thread | None = None

    def succeed(self) -> None:
        """The checkpoint is complete and on the disk."""
        self.error = None

    def fail(self, error: BaseException) -> None:
        """The checkpoint is not on the disk, because of ``error``."""
        self.error = save_error(self.path, error)

    @property
    def done(self) -> bool:
        """Whether the save has ended, well or not."""
        return self._thread is None or not self._thread.is_alive()

    def wait_staged(self) -> None:
        """Return once the live tensors may change. An error in copying is raised by `wait`."""
        if self._staged is not None:
            with self._stall(), contextlib.suppress(Exception):
                self._staged.wait()
            self._staged = None

    def join(self) -> None:
        """Return once the save has ended, well or not."""
        if self._thread is not None and self._thread is not threading.current_thread():
            with self._stall():
                self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """Return once the checkpoint is durable. Raises CheckpointError if the save failed."""
        self.join()
        self.raise_error()

    def raise_error(self) -> None:
        """Raise the error, if there is one, and remember that it was reported."""
        if self.error is not None:
            self.reported = True
            raise self.error

    @contextlib.contextmanager
    def _stall(self) -> Iterator[None]:
        """Count the time inside as waited for."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.stall_seconds += time.perf_counter() - begin

    def start(self, work: Callable[[], None], staged: Staged | None) -> None:
        """Do ``work`` in a new thread, or here where no more can be started; its errors are those that it reports.

        The interpreter does not exit before the thread ends.
        """

        def run() -> None:
            with contextlib.suppress(BaseException):  # ``error`` says what happened
                work()

        self._staged = staged
        thread = threading.Thread(target=run, name=f"mmtrain-save-{self.name}")
        try:
            thread.start()
        except RuntimeError:
            run()
        else:
            self._thread = thread


def save_error(path: Path, error: BaseException) -> CheckpointError:
    """The one-sentence error of a save that failed."""
    reason = str(error) or repr(error)
    failure = CheckpointError(f"{path} was not saved: {reason}; the older checkpoints are untouched")
    failure.__cause__ = error
    return failure
