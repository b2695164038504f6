"""Streams over data that can only be iterated over: an iterable-style dataset, or a loader that the user built."""

import threading
import time
from collections.abc import Iterator, Mapping
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

from mmtrain.data.collate import resolve_collate
from mmtrain.data.iterable.reader import (
    IterableReader,
    ReadRequest,
    ReadResult,
    keeps_state,
    set_epoch,
    shuffles_in_buffer,
)
from mmtrain.data.options import LoaderContext, WorkerOptions, split_options
from mmtrain.data.sampler import check_sizes
from mmtrain.data.stream import Stream
from mmtrain.data.workers.group import CLOSE_SECONDS, KILL_SECONDS
from mmtrain.data.workers.pool import WorkerPool, crowding
from mmtrain.errors import ConfigError, RunError
from mmtrain.types import Batch, StateDict


class NoBatchError(RunError):
    """An epoch without a batch."""


class IterableStream(Stream):
    """Batches of ``batch_size`` samples of an iterable dataset, epoch after epoch.

    With several workers each iterates over its copy (the dataset shards with ``get_worker_info``, as usual in torch)
    and they take turns. Reading one batch ahead finds the end of an epoch. If the dataset has ``state_dict`` and
    ``load_state_dict``, its position can be saved: the stream's state holds that of each worker's copy, as of the last
    batch that was taken, and ``iter(dataset)`` after ``load_state_dict`` must continue there. Otherwise `seek` restarts
    the epoch, and a notice says so. Randomness is seeded once per batch.

    Args: see `TrainStream`. The dataset shards by rank itself, and all ranks must get the same number of batches.
    """

    can_skip = False

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        *,
        drop_last: bool = False,
        collate_fn: Any = None,
        validation: bool = False,
        **options: Any,
    ) -> None:
        context, workers = split_options(options, path="train_dataloader")
        check_sizes(1, batch_size, world_size=1, drop_last=False, path=context.path)
        self.batch_size = batch_size
        self._drop_last = drop_last
        collate = resolve_collate(collate_fn, path=f"{context.path}.collate_fn")
        reader = IterableReader(
            dataset, batch_size, collate, drop_last=drop_last, context=context, validation=validation
        )
        self._set_up(reader, context, workers, saves_position=not validation)

    def _set_up(
        self, reader: IterableReader, context: LoaderContext, workers: WorkerOptions, *, saves_position: bool
    ) -> None:
        self._reader = reader
        self.notices = crowding(workers, context.path)
        self._context = context
        self._readers = max(1, workers.num_workers)
        self._pool = WorkerPool(reader, workers, path=context.path)
        self._stateful = keeps_state(self.dataset) or (reader.replays and saves_position)
        if saves_position and (reader.replays or not self._stateful):
            self.notices.append(self._position_notice(replays=reader.replays))
        if context.world_size > 1:
            even = " and give all ranks the same number of batches" if saves_position else ""  # training alone needs it
            self.notices.append(
                f"{context.path}: each of the {context.world_size} ranks iterates over {type(self.dataset).__name__}, "
                f"which must shard by rank{even}"
            )
        self._begin_at(0, 0, None)

    def _position_notice(self, *, replays: bool) -> str:
        kind = type(self.dataset).__name__
        if replays:
            return (
                f"{self._context.path}.dataset: {kind} shuffles in a buffer that its state_dict does not hold, so a "
                "resumed run reads and drops its epoch up to its position; a map-style dataset avoids that"
            )
        return (
            f"{self._context.path}.dataset: {kind} has no state_dict and load_state_dict, so "
            "its position cannot be saved: a resumed run restarts its epoch"
        )

    @property
    def iterations_per_epoch(self) -> int | None:
        length = _length(self.dataset)
        if length is None or self.batch_size is None or self._readers > 1:
            return None
        return length // self.batch_size if self._drop_last else -(-length // self.batch_size)

    @property
    def has_equal_batches(self) -> bool:
        return self._drop_last

    @property
    def samples(self) -> int | None:
        length, iterations = _length(self.dataset), self.iterations_per_epoch
        if length is None or iterations is None or self.batch_size is None:
            return None
        return min(length, iterations * self.batch_size) * self._context.world_size

    def seek(self, epoch: int, offset: int) -> tuple[int, int]:
        if not (self.can_skip or self._stateful):
            offset = 0
        here = (epoch, offset) == (self._epoch, self._offset)  # e.g. after `load_state_dict`
        self._begin_at(epoch, offset, (self.state_dict() or None) if here else None)
        return epoch, offset

    def state_dict(self) -> StateDict:
        if not self._stateful:
            return {}
        return {"epoch": self._epoch, "offset": self._offset, "turn": self._turn, "readers": list(self._states)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the state of the dataset.

        Raises:
            ConfigError: it was saved with another number of workers, which divided the data differently.
        """
        if not state_dict or not self._stateful:
            return
        saved = len(state_dict["readers"])
        if saved != self._readers:
            raise ConfigError(
                f"{self._context.path}.num_workers: the checkpoint holds the state of {type(self.dataset).__name__} in "
                f"{saved} worker(s), found {self._readers}; use num_workers={saved}, or resume_data='restart'"
            )
        self._begin_at(int(state_dict["epoch"]), int(state_dict["offset"]), dict(state_dict))

    def _begin_at(self, epoch: int, offset: int, state: StateDict | None) -> None:
        """Set the position. Nothing is read before the next batch is taken."""
        self._epoch, self._offset = epoch, offset  # of the next batch to return
        self._reading = epoch  # the epoch that is being read, the next one at the end of an epoch
        self._turn = int(state["turn"]) if state else 0  # the worker whose batch is returned next
        self._states: list[StateDict | None] = list(state["readers"]) if state else [None] * self._readers
        self._ended: set[int] = set()
        self._answering = 0
        self._ahead: tuple[int, ReadResult] | None = None
        self._started = False

    def _requests(self, first_turn: int) -> Iterator[ReadRequest]:
        """Yield the requests to the workers in turn: worker k of n gets request number k, k + n, k + 2n, ...

        An epoch begins with worker 0, a loaded one with the worker whose turn it was; idle requests fill the gap.
        """
        number, epoch, begun = 0, self._reading, [False] * self._readers
        turn = first_turn
        while True:
            if self._reading != epoch:
                epoch, turn = self._reading, 0
            worker = number % self._readers
            if worker == turn:
                yield ReadRequest(epoch, not begun[worker], None if begun[worker] else self._states[worker])
                begun[worker] = True
                turn = (turn + 1) % self._readers
            else:
                yield ReadRequest(epoch, idle=True)
            number += 1

    def _take(self, states: list[StateDict | None]) -> tuple[int, ReadResult] | None:
        """Return the next batch and its worker, or None at the end of the epoch; note the states of ends."""
        while len(self._ended) < self._readers:
            request, result = self._pool.take()
            worker = self._answering
            self._answering = (worker + 1) % self._readers
            if request.idle or request.epoch != self._reading or worker in self._ended:
                continue
            if not result.ended:
                return worker, result
            self._ended.add(worker)
            states[worker] = result.state
        self._ended.clear()
        self._reading += 1
        return None

    def _start(self) -> None:
        self._enter_epoch()
        self._pool.start(self._requests(self._turn))
        self._started = True
        self._ahead = self._take(self._states)
        if self._ahead is None:
            if not self._offset:
                self._raise_no_batch()
            self._epoch, self._offset, self._turn = self._reading, 0, 0  # nothing was left of the epoch

    def _enter_epoch(self) -> None:
        """Tell this process's copy of the dataset the epoch, before its workers do so with theirs.

        Hugging Face's datasets keep it in memory that all processes share, so there it must change before any worker
        reads.
        """
        set_epoch(self.dataset, self._reading)

    def _raise_no_batch(self) -> NoReturn:
        raise NoBatchError(
            f"{self._context.path}.dataset: {type(self.dataset).__name__} yielded no batch in epoch {self._epoch + 1}. "
            "It must yield data each time it is iterated over; a generator does so only once."
        )

    def __next__(self) -> Batch:
        if self._started and self._ahead is None and self._pool.is_stale:
            self.close()
        if not self._started:
            self._start()
        if self._ahead is None:
            self._enter_epoch()
            self._pool.accept_changes()
            self._ahead = self._take(self._states)
        if self._ahead is None:
            self._raise_no_batch()
        worker, result = self._ahead
        states = [*self._states]
        states[worker] = result.state
        ahead = self._take(states)  # before anything of this stream's state changes: it may be interrupted
        self._ahead, self._states, self._turn = ahead, states, (worker + 1) % self._readers
        samples = result.samples * self._context.world_size
        epoch_end = self._ahead is None
        if epoch_end:
            self._epoch, self._offset, self._turn = self._epoch + 1, 0, 0
        else:
            self._offset += samples
        return Batch(result.data, samples, epoch_end)

    def close(self) -> None:
        """End the workers. A dataset with state continues after the last batch that was taken, another one restarts."""
        self._pool.close()
        self._begin_at(self._epoch, self._offset, self.state_dict() or None)


class ForeignStream(IterableStream):
    """Batches of an object that the user built: a torch ``DataLoader``, a ``StatefulDataLoader``, or any iterable.

    It is iterated over once per epoch, in this process. Reading one batch ahead finds the end of an epoch. If it has
    ``state_dict`` and ``load_state_dict``, they save its position. Otherwise `seek` reads the epoch from its start up
    to the position, which is slow, and exact only if its order depends on nothing but the global generators (seeded by
    seed and epoch) or ``set_epoch``. The samples of a batch are counted by `count_samples`.
    """

    can_skip = True  # it reads and drops

    def __init__(self, loader: Any, **options: Any) -> None:
        self._drop_last = (
            getattr(loader, "drop_last", False) is True and getattr(loader, "batch_size", None) is not None
        )
        context, _ = split_options(options, path="train_dataloader")
        self.batch_size = getattr(loader, "batch_size", None)
        reader = IterableReader(loader, None, None, drop_last=False, context=context)
        self._set_up(reader, context, WorkerOptions(), saves_position=True)
        if self._stateful and getattr(loader, "num_workers", None):
            self.notices.append(
                f"{context.path}: {type(loader).__name__} saves the order of its samples but not its workers' random "
                "generators, so random augmentation differs after a resume; a dict with the dataset saves both"
            )

    def _position_notice(self, *, replays: bool) -> str:
        kind = type(self.dataset).__name__
        has = "without state_dict and load_state_dict"
        if shuffles_in_buffer(getattr(self.dataset, "dataset", None)):
            has = "over a dataset that shuffles in a buffer, which no state_dict holds"
        return (
            f"{self._context.path}: {kind} is a ready-made object {has}, so a resumed run reads and drops every batch "
            "of its epoch up to its position; a dict with the dataset is resumed without reading anything"
        )

    def close(self) -> None:
        """Let go of the loader's iterator. Its workers get as long as ours to end, all together.

        torch waits 5 seconds for each in turn; a worker that its parent ends by SIGTERM leaves at once, with status 0.
        """
        super().close()
        timer = threading.Timer(CLOSE_SECONDS, _terminate, [self._reader.processes])
        timer.daemon = True
        timer.start()
        self._reader.drop_iterator()
        self._iterator = None
        timer.cancel()
        deadline = time.monotonic() + KILL_SECONDS
        for process in self._reader.processes:  # of an iterator that something else still refers to
            process.join(max(0.0, deadline - time.monotonic()))
        _terminate(self._reader.processes)

    @property
    def persistent_workers(self) -> bool:
        return getattr(self.dataset, "persistent_workers", None) is True

    @property
    def _iterator(self) -> None:
        return None

    @_iterator.setter
    def _iterator(self, value: None) -> None:
        """Let a torch DataLoader start new workers at the next epoch."""
        if hasattr(self.dataset, "_iterator"):
            self.dataset._iterator = None

    @property
    def iterations_per_epoch(self) -> int | None:
        return _length(self.dataset)

    @property
    def samples(self) -> int | None:
        return None

    def _start(self) -> None:
        target = self._offset
        super()._start()
        if self._stateful or not target:
            return
        self._offset = 0
        while self._offset < target and self._ahead is not None:
            super().__next__()


def _terminate(processes: list[BaseProcess]) -> None:
    for process in processes:
        if process.is_alive():
            process.terminate()


def _length(source: Any) -> int | None:
    try:
        return len(source)
    except (TypeError, NotImplementedError):
        return None
