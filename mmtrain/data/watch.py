"""Finds what reading changes in a data set, in a data worker: its copy is out of the main process's sight."""

import json
import mmap
from typing import Any

from torch.utils.data import get_worker_info

from mmtrain.types import Stateful
from mmtrain.value_marks import LARGEST_OF_DATA, Marks, Walk, changed_state, clocks

_SIZE = 1 << 16
_READS = 3


class DatasetWatch:
    """Compares what a data set keeps before the first three batches of worker 0.

    The result is in memory that a forked worker shares with the main process; workers started in other ways report
    nothing.
    """

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = mmap.mmap(-1, _SIZE)
        self._reads = 0
        self._marks: list[Marks] = []
        self._clocks = clocks()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_memory": None}

    def look(self, dataset: Any) -> None:
        """Called before each batch is read; after the first ones it does nothing."""
        if self._reads >= _READS or self._memory is None:
            return
        worker = get_worker_info()
        if worker is None or worker.id != 0:
            self._reads = _READS
            return
        self._reads += 1
        walk = Walk(LARGEST_OF_DATA)
        walk.value(dataset, "dataset")
        self._marks.append(walk.marks)
        if self._reads > 1:
            names = changed_state(self._marks[0], self._marks[1], walk.marks, self._clocks)
            self._write([names, [name for name in names if name in walk.generators]])

    def stop(self) -> None:
        """Let workers that are started from now on compare nothing."""
        self._reads = _READS

    def found(self) -> tuple[list[str], list[str]]:
        """The names that changed, and which of them are generators, as far as a worker has compared."""
        text = b"" if self._memory is None else self._memory[:].rstrip(b"\0")
        try:
            names, generators = json.loads(text)
        except ValueError:  # nothing yet, or half of it
            return [], []
        return names, generators

    def _write(self, found: list[list[str]]) -> None:
        assert self._memory is not None
        text = json.dumps(found).encode()
        if len(text) <= _SIZE:
            self._memory[:] = text.ljust(_SIZE, b"\0")


def watch_for(dataset: Any) -> DatasetWatch | None:
    """A watch, unless the data set saves its state itself."""
    return None if isinstance(dataset, Stateful) else DatasetWatch()
