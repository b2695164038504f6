"""Streams over data that can only be iterated over: a data set, or a loader that the user has built."""

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from mmtrain.data.collate import resolve_collate
from mmtrain.data.iterable.reader import IterableReader, Order, Piece, keeps_state
from mmtrain.data.options import Place, WorkerOptions, split_options
from mmtrain.data.sampler import check_sizes
from mmtrain.data.stream import Stream
from mmtrain.data.workers.pool import WorkerPool, crowding
from mmtrain.errors import ConfigError, RunError
from mmtrain.types import Batch, StateDict


class IterableStream(Stream):
    """Batches of an iterable data set, pass after pass, in batches of ``batch_size``.

    With several workers each iterates over its own copy (the data set shards with ``get_worker_info``, as everywhere
    in torch) and they take turns. The end of a pass is known by reading one batch ahead. Its position is kept when the
    data set has ``state_dict`` and ``load_state_dict``: then its state, as of the last batch handed over, is in
    `state_dict`, one for each worker, and ``iter(dataset)`` after ``load_state_dict`` must go on behind it. If it has
    not, `seek` begins the pass anew, and a notice says so. Randomness is seeded once a batch.

    Args: see `TrainStream`; the data set shards by rank itself, and all ranks must get equally many batches.
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
        place, workers = split_options(options, path="train_dataloader")
        check_sizes(1, batch_size, world_size=1, drop_last=False, path=place.path)
        self.batch_size = batch_size
        self._drop_last = drop_last
        collate = resolve_collate(collate_fn, path=f"{place.path}.collate_fn")
        reader = IterableReader(dataset, batch_size, collate, drop_last=drop_last, place=place, validation=validation)
        self._set_up(reader, place, workers, one_pass=validation)

    def _set_up(self, reader: IterableReader, place: Place, workers: WorkerOptions, *, one_pass: bool) -> None:
        self.dataset = reader.dataset
        self.notices = crowding(workers, place.path)
        self._place = place
        self._readers = max(1, workers.num_workers)
        self._pool = WorkerPool(reader, workers, path=place.path)
        self._stateful = keeps_state(self.dataset)
        if not self._stateful and not one_pass:
            self.notices.append(self._position_remark())
        if place.world_size > 1:
            self.notices.append(
                f"{place.path}: each of the {place.world_size} ranks iterates over {type(self.dataset).__name__} by "
                "itself: it must shard by rank and give every rank equally many batches"
            )
        self._begin_at(0, 0, None)

    def _position_remark(self) -> str:
        return (
            f"{self._place.path}.dataset: {type(self.dataset).__name__} has no state_dict and load_state_dict, so its "
            "position cannot be saved: a resumed run restarts its epoch"
        )

    @property
    def iterations_per_epoch(self) -> int | None:
        length = _length(self.dataset)
        if length is None or self.batch_size is None or self._readers > 1:
            return None
        return length // self.batch_size if self._drop_last else -(-length // self.batch_size)

    @property
    def samples(self) -> int | None:
        length, iterations = _length(self.dataset), self.iterations_per_epoch
        if length is None or iterations is None or self.batch_size is None:
            return None
        return min(length, iterations * self.batch_size) * self._place.world_size

    def seek(self, epoch: int, offset: int) -> tuple[int, int]:
        if not (self.can_skip or self._stateful):
            offset = 0
        here = (epoch, offset) == (self._epoch, self._offset)  # after `load_state_dict`, or already there
        self._begin_at(epoch, offset, (self.state_dict() or None) if here else None)
        return epoch, offset

    def state_dict(self) -> StateDict:
        if not self._stateful:
            return {}
        return {"epoch": self._epoch, "offset": self._offset, "turn": self._turn, "readers": list(self._states)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take back the state of the data set.

        Raises:
            ConfigError: it was saved with another number of workers, which cut the data otherwise.
        """
        if not state_dict or not self._stateful:
            return
        saved = len(state_dict["readers"])
        if saved != self._readers:
            raise ConfigError(
                f"{self._place.path}.num_workers: the checkpoint's state of {type(self.dataset).__name__} is that of "
                f"{saved} worker(s), found {self._readers}; use num_workers={saved}, or resume_data='restart'"
            )
        self._begin_at(int(state_dict["epoch"]), int(state_dict["offset"]), dict(state_dict))

    def _begin_at(self, epoch: int, offset: int, state: StateDict | None) -> None:
        """Stand at a position; nothing is read before the next batch is taken."""
        self._epoch, self._offset = epoch, offset  # of the next batch to hand over
        self._reading = epoch  # the pass that is being read, one ahead at a pass's end
        self._turn = int(state["turn"]) if state else 0  # whose batch is the next to hand over
        self._states: list[StateDict | None] = list(state["readers"]) if state else [None] * self._readers
        self._ended: set[int] = set()
        self._answering = 0
        self._ahead: tuple[int, Piece] | None = None
        self._started = False

    def _orders(self, first_turn: int) -> Iterator[Order]:
        """Give the workers their orders in turns: worker k gets order number k, k + n, k + 2n, ...

        A pass begins with worker 0, and a loaded one with the worker whose turn it was; idle orders fill the gap.
        """
        number, epoch, begun = 0, self._reading, [False] * self._readers
        turn = first_turn
        while True:
            if self._reading != epoch:
                epoch, turn = self._reading, 0
            worker = number % self._readers
            if worker == turn:
                yield Order(epoch, not begun[worker], None if begun[worker] else self._states[worker])
                begun[worker] = True
                turn = (turn + 1) % self._readers
            else:
                yield Order(epoch, idle=True)
            number += 1

    def _take(self) -> tuple[int, Piece] | None:
        """Return the next batch and whose it is, or None at the end of the pass."""
        while len(self._ended) < self._readers:
            order, piece = self._pool.take()
            worker = self._answering
            self._answering = (worker + 1) % self._readers
            if order.idle or order.epoch != self._reading or worker in self._ended:
                continue
            if not piece.ended:
                return worker, piece
            self._ended.add(worker)
            self._states[worker] = piece.state
        self._ended.clear()
        self._reading += 1
        return None

    def _start(self) -> None:
        self._pool.start(self._orders(self._turn))
        self._started = True
        self._ahead = self._take()
        if self._ahead is None:
            if not self._offset:
                self._raise_no_batch()
            self._epoch, self._offset, self._turn = self._reading, 0, 0  # nothing was left of the pass

    def _raise_no_batch(self) -> NoReturn:
        raise RunError(
            f"{self._place.path}.dataset: {type(self.dataset).__name__} gave no batch in pass {self._epoch}; it must "
            "give data each time it is iterated over (a generator does so once only)"
        )

    def __next__(self) -> Batch:
        if not self._started:
            self._start()
        if self._ahead is None:
            self._ahead = self._take()
        if self._ahead is None:
            self._raise_no_batch()
        worker, piece = self._ahead
        self._states[worker] = piece.state
        self._turn = (worker + 1) % self._readers
        self._ahead = self._take()
        samples = piece.samples * self._place.world_size
        epoch_end = self._ahead is None
        if epoch_end:
            self._epoch, self._offset, self._turn = self._epoch + 1, 0, 0
        else:
            self._offset += samples
        return Batch(piece.data, samples, epoch_end)

    def close(self) -> None:
        """End the workers; a data set with state goes on where the last batch was handed over, another begins anew."""
        self._pool.close()
        self._begin_at(self._epoch, self._offset, self.state_dict() or None)


class ForeignStream(IterableStream):
    """Batches of an object that the user has built: a torch ``DataLoader``, a ``StatefulDataLoader``, any iterable.

    It is iterated over again and again, in this process. The end of a pass is known by reading one batch ahead. Where
    it has ``state_dict`` and ``load_state_dict`` they keep its position; where not, `seek` reads the pass from its
    beginning up to the position, which is slow and only right when its order depends on nothing but the global
    generators (seeded by seed and epoch) or ``set_epoch``. A batch's samples are counted by its first tensor.
    """

    can_skip = True  # it reads and drops

    def __init__(self, loader: Any, **options: Any) -> None:
        place, _ = split_options(options, path="train_dataloader")
        self.batch_size = getattr(loader, "batch_size", None)
        reader = IterableReader(loader, None, None, drop_last=False, place=place)
        self._set_up(reader, place, WorkerOptions(), one_pass=False)
        if self._stateful and getattr(loader, "num_workers", None):
            self.notices.append(
                f"{place.path}: {type(loader).__name__} keeps the order of its samples but not its workers' random "
                "generators, so random augmentation differs after a resume; a dict with the data set keeps both"
            )

    def _position_remark(self) -> str:
        return (
            f"{self._place.path}: {type(self.dataset).__name__} was built outside and has no state_dict and "
            "load_state_dict, so a resumed run reads and drops every batch of its pass up to its position; a dict with "
            "the data set is resumed without reading anything"
        )

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


def _length(source: Any) -> int | None:
    try:
        return len(source)
    except (TypeError, NotImplementedError):
        return None
