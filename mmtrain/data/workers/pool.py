"""Batches from data workers, or read in the main process when there are no workers."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch.utils.data._utils.pin_memory import pin_memory

from mmtrain.data.options import WorkerOptions
from mmtrain.data.reader import SampleError
from mmtrain.data.workers.group import WorkerGroup
from mmtrain.data.workers.shortage import PREFETCH_FACTOR, explain
from mmtrain.data.workers.snapshot import Snapshot
from mmtrain.data.workers.worker import Reader
from mmtrain.interruption import wait


class WorkerPool:
    """Returns, request by request and in order, what ``reader(request)`` returns.

    With ``num_workers=0`` the reader is called here. With workers it is called in them, up to ``prefetch_factor``
    requests ahead in each, and the main process's global generators are never used. `start` drops the requests that
    are under way and continues with others in the same workers.

    After `close`, `start` makes new workers, which get the dataset as it is then. A position in the data is not the
    pool's: it belongs to the requests, so workers can be renewed between any two batches. `start` renews them itself
    where `is_stale`: without ``persistent_workers=True`` always, with it if the dataset or ``collate`` of the reader
    has changed in this process since they were started, or after `renew`.

    ``reader.dataset`` is what ``torch.utils.data.get_worker_info().dataset`` returns in the user's code.
    """

    def __init__(self, reader: Reader, options: WorkerOptions, *, path: str) -> None:
        self._reader = reader
        self._options = options
        self._path = path
        wanted = torch.cuda.is_available() if options.pin_memory is None else options.pin_memory
        self._pin = bool(wanted) and torch.accelerator.is_available()
        self._requests: Iterator[Any] = iter(())
        self._generation = 0  # the number of calls of `start`
        self._pending: deque[tuple[int, Any]] = deque()  # generation and request of what the workers have, oldest first
        self._group: WorkerGroup | None = None
        self._renew = False
        self._snapshot: Snapshot | None = None  # of what the workers got, where they are kept
        self._close_group: Finalize | None = None

    def start(self, requests: Iterable[Any]) -> None:
        """Continue with these requests; what was read for earlier ones is dropped."""
        self._requests = iter(requests)
        self._generation += 1
        if self._options.num_workers == 0:
            return
        if self.is_stale:
            self.close()
            self._requests = iter(requests)
        if self._group is None:
            self._renew = False
            self.accept_changes()
            self._group = WorkerGroup(self._reader, self._options, path=self._path, pin=self._pin)
            # Runs when the pool is collected or the process ends, before multiprocessing waits for its children, and
            # only in the process that made it.
            self._close_group = Finalize(self, self._group.close, exitpriority=100)
        self._group.restart_turns()
        for _ in range((self._options.prefetch_factor or PREFETCH_FACTOR) * self._options.num_workers):
            self._ask_next()

    @property
    def num_workers(self) -> int:
        return self._options.num_workers

    @property
    def keeps_workers(self) -> bool:
        """Whether workers that nothing has changed stay alive when `start` is called."""
        return self._options.persistent_workers is True

    @property
    def is_stale(self) -> bool:
        """Whether `start` would replace the workers by new ones."""
        if self._group is None:
            return False
        return self._renew or not self.keeps_workers or self._snapshot != self._take_snapshot()

    def renew(self) -> None:
        """Let the next `start` make new workers."""
        self._renew = True

    def accept_changes(self) -> None:
        """Take the dataset as it is now for what the workers have."""
        self._snapshot = self._take_snapshot() if self.keeps_workers and self.num_workers else None

    def _take_snapshot(self) -> Snapshot:
        return Snapshot(getattr(self._reader, "dataset", None), getattr(self._reader, "collate", None))

    def take(self) -> tuple[Any, Any]:
        """Return the next request and what was read for it.

        Raises:
            StopIteration: there are no more requests.
            RunError: the reader failed, or a worker ended.
            Interrupted: a signal asks the run to leave, and it can be saved as it is. The pool can only be closed.
        """
        wait.waiting = True
        try:
            if wait.requested:
                wait.check()
            if self._group is None:
                request = next(self._requests)
                data = self._reader(request)
            else:
                request, data = self._take_answer(self._group)
        finally:
            wait.waiting = False
        if isinstance(data, SampleError):
            self._explained(data, request).raise_it()
        return request, (pin_memory(data) if self._pin and self._group is None else data)

    def close(self) -> None:
        """End the workers. They finish their current batch first; after 5 seconds they are killed."""
        self._group = None
        self._pending.clear()
        if self._close_group is not None:
            self._close_group()
            self._close_group = None
            self._requests = iter(())

    def _take_answer(self, group: WorkerGroup) -> tuple[Any, Any]:
        while self._pending:
            generation, request = self._pending.popleft()
            try:
                data = group.answer()
            except (RuntimeError, OSError) as error:
                data = self._explained(SampleError("", error), request)
                if not data.sentence:
                    raise
            if generation == self._generation:
                self._ask_next()
                return request, data
        raise StopIteration

    def _explained(self, failure: SampleError, request: Any) -> SampleError:
        """Return a failure with what ran out, if that is the cause."""
        sentence = explain(failure.error, request, self._options, self._path) if self._options.num_workers else None
        return failure if sentence is None else SampleError(sentence, failure.error, failure.trace)

    def _ask_next(self) -> None:
        assert self._group is not None
        for request in self._requests:
            self._group.ask(request)
            self._pending.append((self._generation, request))
            return


def crowding(options: WorkerOptions, path: str) -> list[str]:
    """Return the notice to report at start when there are more workers than processors."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if options.num_workers <= cores:
        return []
    return [f"{path}.num_workers: {options.num_workers} workers on {cores} processors; fewer may be faster"]
