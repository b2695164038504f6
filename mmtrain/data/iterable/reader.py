"""Reading a data set that can only be iterated over: what happens in a data worker, or in the main process."""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch.utils.data import get_worker_info

from mmtrain.data.options import Place
from mmtrain.data.reader import Collate, SampleError, describe
from mmtrain.randomness import STREAM_BATCH, STREAM_SHUFFLE, STREAM_VAL, mix, seed_generators
from mmtrain.types import StateDict


class Order(NamedTuple):
    """What the main process asks of a reader.

    ``begin`` marks the first order to a reader after `seek`: it takes ``state`` (None: none) and begins the pass.
    An ``idle`` order asks for nothing; it keeps the turns of the workers in step.
    """

    epoch: int
    begin: bool = False
    state: StateDict | None = None
    idle: bool = False


class Piece(NamedTuple):
    """What a reader answers: a batch of ``samples`` samples, or that its pass has ended; and its state after it."""

    data: Any = None
    samples: int = 0
    ended: bool = False
    state: StateDict | None = None


def keeps_state(source: Any) -> bool:
    """Tell whether an iterable offers ``state_dict`` and ``load_state_dict``."""
    return callable(getattr(source, "state_dict", None)) and callable(getattr(source, "load_state_dict", None))


class IterableReader:
    """Iterates over its copy of an iterable, batch by batch, pass after pass.

    The global generators are seeded before each pass by (seed, epoch, worker) and before each batch by (seed, epoch,
    worker, number of the batch in the worker's pass, rank). ``batch_size`` None: each element is a batch already.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int | None,
        collate: Collate | None,
        *,
        drop_last: bool,
        place: Place,
        validation: bool = False,
    ) -> None:
        self.dataset = dataset
        self._batch_size = batch_size
        self._collate = collate
        self._drop_last = drop_last
        self._place = place
        self._stream = STREAM_VAL if validation else STREAM_BATCH
        self._stateful = keeps_state(dataset)
        self._pristine: StateDict | None = None  # the data set's state before it was first iterated over
        self._epoch = -1
        self._batch = 0
        self._ended = False
        self._iterator: Iterator[Any] = iter(())

    def __call__(self, order: Order) -> Piece | SampleError:
        if order.idle:
            return Piece()
        try:
            if order.begin:
                self._restore(order)
            if order.epoch > self._epoch:
                self._begin_pass(order.epoch)
            return Piece(ended=True, state=self._state()) if self._ended else self._read()
        except Exception as error:
            what = f"batch {self._batch}" if self._epoch >= 0 else "its beginning"
            return SampleError(
                f"{self._place.path}.dataset: {type(self.dataset).__name__} failed at {what} of pass {order.epoch} "
                f"with {describe(error)}",
                error,
            )

    def _restore(self, order: Order) -> None:
        self._epoch = -1
        if self._stateful and self._batch_size is not None and self._pristine is None:
            self._pristine = deepcopy(self.dataset.state_dict())
        elif order.state is None and self._pristine is not None:
            self.dataset.load_state_dict(deepcopy(self._pristine))
        if order.state is None:
            return
        self._set_epoch(int(order.state["epoch"]))
        self.dataset.load_state_dict(order.state["dataset"])
        self._epoch, self._batch = int(order.state["epoch"]), int(order.state["batch"])
        self._ended = bool(order.state["ended"])
        if not self._ended and self._epoch == order.epoch:
            self._make_iterator()

    def _begin_pass(self, epoch: int) -> None:
        self._set_epoch(epoch)
        self._epoch, self._batch, self._ended = epoch, 0, False
        self._make_iterator()

    def _make_iterator(self) -> None:
        seed_generators(mix(STREAM_SHUFFLE, self._place.seed, self._epoch, _worker_id()))
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

    def _read(self) -> Piece:
        seed, rank = self._place.seed, self._place.rank
        seed_generators(mix(self._stream, seed, self._epoch, _worker_id(), self._batch, rank))
        wanted = self._batch_size or 1
        samples = list(islice(self._iterator, wanted))
        if not samples or (self._drop_last and len(samples) < wanted):
            self._ended = True
            return Piece(ended=True, state=self._state())
        self._batch += 1
        state = self._state()
        if self._batch_size is None:
            return Piece(samples[0], count_samples(samples[0]), state=state)
        return Piece(self._collate(samples) if self._collate else samples, len(samples), state=state)

    def _state(self) -> StateDict | None:
        """Return the state after what was read; a copy, because it is sent later and the data set goes on."""
        if not self._stateful:
            return None
        inner = deepcopy(self.dataset.state_dict())
        return {"epoch": self._epoch, "batch": self._batch, "ended": self._ended, "dataset": inner}


def _worker_id() -> int:
    info = get_worker_info()
    return 0 if info is None else info.id


def count_samples(data: Any) -> int:
    """Return the number of samples in a ready batch: the first dimension of its first tensor, 1 without any."""
    if isinstance(data, torch.Tensor):
        return data.shape[0] if data.ndim else 1
    if isinstance(data, Mapping):
        data = list(data.values())
    if isinstance(data, list | tuple):
        for value in data:
            if isinstance(value, torch.Tensor | Mapping | list | tuple):
                return count_samples(value)
        return max(1, len(data))
    return 1
