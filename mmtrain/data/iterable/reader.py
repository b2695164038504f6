"""Reading an iterable-style dataset, in a data worker or in the main process."""

from collections.abc import Iterator
from copy import deepcopy
from itertools import islice
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
    """Return whether an iterable has ``state_dict`` and ``load_state_dict``."""
    return callable(getattr(source, "state_dict", None)) and callable(getattr(source, "load_state_dict", None))


class IterableReader:
    """Iterates over its copy of an iterable, batch by batch, epoch after epoch.

    The global generators are seeded before each epoch by (seed, epoch, worker) and before each batch by (seed, epoch,
    worker, number of the batch in the worker's epoch, rank). With ``batch_size=None`` each element is a batch.
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
        self.dataset = dataset
        self._batch_size = batch_size
        self._collate = collate
        self._drop_last = drop_last
        self._context = context
        self._stream = STREAM_VAL if validation else STREAM_BATCH
        self._stateful = keeps_state(dataset)
        self._pristine: StateDict | None = None  # the dataset's state before it was first iterated over
        self._epoch = -1
        self._batch = 0
        self._ended = False
        self._iterator: Iterator[Any] = iter(())

    def __call__(self, request: ReadRequest) -> ReadResult | SampleError:
        if request.idle:
            return ReadResult()
        try:
            if request.begin:
                self._restore(request)
            if request.epoch > self._epoch:
                self._begin_epoch(request.epoch)
            return ReadResult(ended=True, state=self._state()) if self._ended else self._read()
        except Exception as error:
            where = f"batch {self._batch}" if self._epoch >= 0 else "the start"
            return SampleError(
                f"{self._context.path}.dataset: {type(self.dataset).__name__} raised {describe(error)} at {where} of "
                f"epoch {request.epoch + 1}",
                error,
            )

    def _restore(self, request: ReadRequest) -> None:
        self._epoch = -1
        if self._stateful and self._batch_size is not None and self._pristine is None:
            self._pristine = deepcopy(self.dataset.state_dict())
        elif request.state is None and self._pristine is not None:
            self.dataset.load_state_dict(deepcopy(self._pristine))
        if request.state is None:
            return
        self._set_epoch(int(request.state["epoch"]))
        self.dataset.load_state_dict(request.state["dataset"])
        self._epoch, self._batch = int(request.state["epoch"]), int(request.state["batch"])
        self._ended = bool(request.state["ended"])
        if not self._ended and self._epoch == request.epoch:
            self._make_iterator()

    def _begin_epoch(self, epoch: int) -> None:
        self._set_epoch(epoch)
        self._epoch, self._batch, self._ended = epoch, 0, False
        self._make_iterator()

    def _make_iterator(self) -> None:
        seed_generators(mix(STREAM_SHUFFLE, self._context.seed, self._epoch, _worker_id()))
        self._iterator = iter(self.dataset)

    def _set_epoch(self, epoch: int) -> None:
        """Call ``set_epoch`` of the iterable, or of the sampler inside a torch DataLoader."""
        sampler = getattr(self.dataset, "sampler", None)
        inner = getattr(getattr(self.dataset, "batch_sampler", None), "sampler", None)
        for target in (self.dataset, sampler, inner):
            set_epoch = getattr(target, "set_epoch", None)
            if callable(set_epoch):
                set_epoch(epoch)
                return

    def _read(self) -> ReadResult:
        seed, rank = self._context.seed, self._context.rank
        seed_generators(mix(self._stream, seed, self._epoch, _worker_id(), self._batch, rank))
        wanted = self._batch_size or 1
        samples = list(islice(self._iterator, wanted))
        if not samples or (self._drop_last and len(samples) < wanted):
            self._ended = True
            return ReadResult(ended=True, state=self._state())
        self._batch += 1
        state = self._state()
        if self._batch_size is None:
            return ReadResult(samples[0], count_samples(samples[0]), state=state)
        return ReadResult(self._collate(samples) if self._collate else samples, len(samples), state=state)

    def _state(self) -> StateDict | None:
        """Return a copy of the state after the last batch; the dataset continues before the state is saved."""
        if not self._stateful:
            return None
        inner = deepcopy(self.dataset.state_dict())
        return {"epoch": self._epoch, "batch": self._batch, "ended": self._ended, "dataset": inner}


def _worker_id() -> int:
    info = get_worker_info()
    return 0 if info is None else info.id
