"""Reading an iterable-style dataset, in a data worker or in the main process."""

from collections.abc import Iterator
from copy import deepcopy
from itertools import islice
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

from torch.utils.data import get_worker_info

from mmtrain.data.batch import count_samples
from mmtrain.data.options import LoaderContext
from mmtrain.data.reader import Collate, SampleError, describe
from mmtrain.randomness import STREAM_BATCH, STREAM_SHUFFLE, STREAM_VAL, mix, seed_generators
from mmtrain.types import StateDict


class ReadRequest(NamedTuple):
    """A request of the main process to a reader: the next batch of epoch ``epoch``.

    ``begin`` marks the first request to a reader after `seek`: it restores ``state``, if any, and begins the epoch. An
    ``idle`` request asks for nothing; it keeps the turns of the workers in step.
    """

    epoch: int
    begin: bool = False
    state: StateDict | None = None
    idle: bool = False


class ReadResult(NamedTuple):
    """A reader's answer: a batch of ``samples`` samples, or that its epoch has ended; and its state afterwards."""

    data: Any = None
    samples: int = 0
    ended: bool = False
    state: StateDict | None = None


def keeps_state(source: Any) -> bool:
    """Return whether an iterable has ``state_dict`` and ``load_state_dict``, and they hold its whole position."""
    has_both = callable(getattr(source, "state_dict", None)) and callable(getattr(source, "load_state_dict", None))
    return has_both and not shuffles_in_buffer(source) and not shuffles_in_buffer(getattr(source, "dataset", None))


def is_hugging_face(source: Any) -> bool:
    """Return whether this is an ``IterableDataset`` of Hugging Face; the library is not imported for it."""
    return hasattr(source, "_ex_iterable") and keeps_epoch(source)


def shuffles_in_buffer(source: Any) -> bool:
    """Return whether this is a dataset of Hugging Face that shuffles (``IterableDataset.shuffle``).

    The examples in its buffer are not in its ``state_dict``, and with several workers that state cannot be loaded at
    all (datasets 5.2). The library has no public way to ask.
    """
    waiting, seen = [getattr(source, "_ex_iterable", None)], 0
    while waiting and seen < 1000:
        one = waiting.pop()
        seen += 1
        if type(one).__name__ == "BufferShuffledExamplesIterable":
            return True
        waiting += [inner for inner in [getattr(one, "ex_iterable", None)] if inner is not None]
        waiting += getattr(one, "ex_iterables", [])
    return False


def keeps_epoch(source: Any) -> bool:
    """Return whether an object has ``set_epoch``."""
    return callable(getattr(source, "set_epoch", None))


def set_epoch(source: Any, epoch: int) -> None:
    """Call ``set_epoch`` of an iterable, or of the sampler or the dataset inside a torch DataLoader."""
    sampler = getattr(source, "sampler", None)
    inner = getattr(getattr(source, "batch_sampler", None), "sampler", None)
    targets: tuple[Any, ...] = (source, sampler, inner, getattr(source, "dataset", None))
    for target in targets:
        if keeps_epoch(target):
            target.set_epoch(epoch)
            return


class IterableReader:
    """Iterates over its copy of an iterable, batch by batch, epoch after epoch.

    The global generators are seeded before each epoch by (seed, epoch, worker) and before each batch by (seed, epoch,
    worker, number of the batch in the worker's epoch, rank). With ``batch_size=None`` each element is a batch.

    The state of an iterable is saved as of the last batch. Iterables differ in what their state means when a pass has
    ended: some are ready for the next pass, others are still at the end, and then ``iter()`` gives nothing once more.
    So the state of an end is the last one *before* it, and restoring it runs through the end again: ``reread`` batches
    are read and dropped, and the iterator ends. Whatever the iterable does there (reset its position, count its passes)
    is done as in a run without a stop. Only if no such state is known, because the first batch of the epoch was
    incomplete, the state after the end is saved (without ``reread``). Then an ``iter()`` that gives nothing is called
    again.

    With ``replays`` the iterable's state is neither saved nor loaded: the batches of the epoch are read again and
    dropped, up to the position.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int | None,
        collate: Collate | None,
        *,
        drop_last: bool,
        context: LoaderContext,
        validation: bool = False,
    ) -> None:
        self.replays = shuffles_in_buffer(dataset)
        self.dataset = dataset
        self.collate = collate
        self._batch_size = batch_size
        self._drop_last = drop_last
        self._context = context
        self._stream = STREAM_VAL if validation else STREAM_BATCH
        self._stateful = keeps_state(dataset)  # has a state of its own that is saved
        self._pristine: StateDict | None = None  # the dataset's state before it was first iterated over
        self._epoch = -1
        self._batch = 0
        self._ended = False
        self._state: StateDict | None = None  # as of the last batch; None at the start of an epoch
        self._loaded_end: StateDict | None = None  # a state of an end that was restored, until the next epoch begins
        self._iterator: Iterator[Any] = iter(())
        self.processes: list[BaseProcess] = []  # that a loader of the user started for its iterator

    def __call__(self, request: ReadRequest) -> ReadResult | SampleError:
        if request.idle:
            return ReadResult()
        try:
            if request.begin:
                self._restore(request)
            if request.epoch > self._epoch:
                self._begin_epoch(request.epoch)
            return ReadResult(ended=True, state=self._state) if self._ended else self._read()
        except Exception as error:
            where = f"batch {self._batch}" if self._epoch >= 0 else "the start"
            return SampleError(
                f"{self._context.path}.dataset: {type(self.dataset).__name__} raised {describe(error)} at {where} of "
                f"epoch {request.epoch + 1}",
                error,
            )

    # ---- from epoch to epoch -------------------------------------------------------------------------------------
    def _restore(self, request: ReadRequest) -> None:
        self._epoch, self._state, self._loaded_end = -1, None, None
        if self._stateful and self._batch_size is not None and self._pristine is None:
            self._pristine = deepcopy(self.dataset.state_dict())
        elif request.state is None and self._pristine is not None:
            self.dataset.load_state_dict(deepcopy(self._pristine))
        state = request.state
        if state is None:
            return
        self._epoch, self._ended, self._state = int(state["epoch"]), bool(state["ended"]), state
        if self._ended and is_hugging_face(self.dataset):
            return  # with the next epoch's number it starts again; and workers share the memory in which that number is
        set_epoch(self.dataset, self._epoch)
        if not self.replays:
            self.dataset.load_state_dict(state["dataset"])
        if self._ended:
            self._loaded_end = state
        else:
            self._make_iterator()
            for number in range(int(state["batch"]) if self.replays else 0):
                self._batch = number
                self._read_samples()
        self._batch = int(state["batch"])

    def _begin_epoch(self, epoch: int) -> None:
        end = self._loaded_end
        if end is not None and "reread" in end:
            self._make_iterator()
            self._next_samples(int(end["reread"]))
            next(self._iterator, None)
        set_epoch(self.dataset, epoch)
        self._epoch, self._batch, self._ended, self._state = epoch, 0, False, None
        self._make_iterator()

    def _make_iterator(self) -> None:
        seed_generators(mix(STREAM_SHUFFLE, self._context.seed, self._epoch, _worker_id()))
        before = [] if self._batch_size else active_children()
        self._iterator = iter(self.dataset)
        if not self._batch_size:
            alive = [one for one in self.processes if one.is_alive()]
            self.processes = alive + [one for one in active_children() if one not in before]

    def drop_iterator(self) -> None:
        """Let go of the iterator; that of a torch DataLoader then ends its workers."""
        self._iterator = iter(())

    # ---- a batch -------------------------------------------------------------------------------------------------
    def _read(self) -> ReadResult:
        wanted = self._batch_size or 1
        samples = self._read_samples()
        if not samples and self._loaded_end is not None:  # `iter` found the dataset still at the end of its last epoch
            self._make_iterator()
            samples = self._read_samples()
        self._loaded_end = None
        if len(samples) < wanted:
            self._ended = True
            self._state = self._end_state(reread=bool(samples))
            if not samples or self._drop_last:
                return ReadResult(ended=True, state=self._state)
        self._batch += 1
        if not self._ended:
            self._state = self._captured()
        if self._batch_size is None:
            return ReadResult(samples[0], count_samples(samples[0]), state=self._state)
        return ReadResult(self.collate(samples) if self.collate else samples, len(samples), state=self._state)

    def _read_samples(self) -> list[Any]:
        seed, rank = self._context.seed, self._context.rank
        seed_generators(mix(self._stream, seed, self._epoch, _worker_id(), self._batch, rank))
        return self._next_samples(1)

    def _next_samples(self, batches: int) -> list[Any]:
        return list(islice(self._iterator, batches * (self._batch_size or 1)))

    def _captured(self) -> StateDict | None:
        """Return a copy of the state now; the dataset continues before the state is saved."""
        if not (self._stateful or self.replays):
            return None
        inner = None if self.replays else deepcopy(self.dataset.state_dict())
        return {"epoch": self._epoch, "batch": self._batch, "ended": self._ended, "dataset": inner}

    def _end_state(self, *, reread: bool) -> StateDict | None:
        """Return the state of the end: the last one before it, and whether one more batch was read since."""
        if self._state is None:
            return self._captured()
        return self._state | {"ended": True, "reread": int(reread)}


def _worker_id() -> int:
    info = get_worker_info()
    return 0 if info is None else info.id
