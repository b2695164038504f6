"""The ledger of a run: which samples each update really consumed, as run-length records.

A raw list of samples would not compress, because a pass is shuffled; positions in the pass's order do. For every batch
that the loop took, the ledger compares the sample indices that the reader reports with the order that it computes for
itself, and notes the positions: a `Run` grows by one iteration as long as batches follow one another. A batch whose
indices are not those of its positions is noted with its indices. So the record takes a few lines a pass, however many
samples it has, and `account` can prove it: each run carries a digest of its (position, index) pairs, which only the
right order gives again.

Every rank notes its own share; a save gathers and joins them, so that all ranks hold the same history.
"""

from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np

from mmtrain import dist
from mmtrain.data.permutation import Order, epoch_order, scramble
from mmtrain.errors import CheckpointError, ConfigError
from mmtrain.progress import Progress
from mmtrain.types import Batch, StateDict

FORMAT = 1
_MASK64 = (1 << 64) - 1


def digest(start: int, indices: np.ndarray) -> int:
    """Return a 64-bit sum over pairs of a position (from ``start`` on) and the sample index that was read there.

    It does not depend on how the pairs are divided among batches, ranks or saves: digests of parts add up.
    """
    positions = np.arange(start, start + len(indices), dtype=np.uint64)
    return int(scramble(scramble(positions) ^ indices.astype(np.uint64)).sum(dtype=np.uint64))


@dataclass(slots=True)
class Run:
    """Consecutive iterations that read their positions one after the other.

    Iteration k of the run (0 <= k < ``count``) is the run's iteration ``iteration + k`` and reads ``length`` positions
    of pass ``epoch`` from ``start + k * stride`` on, ``stride`` being what all ranks together consume in it. ``update``
    counts the optimizer steps that were applied before, ``micro`` the iterations of the window. ``indices`` are
    there only where they are not those of the positions.
    """

    segment: int
    epoch: int
    start: int
    length: int
    stride: int
    count: int
    iteration: int
    update: int
    micro: int
    digest: int = 0
    indices: list[int] | None = None

    @property
    def stop(self) -> int:
        """The position behind the last one."""
        return self.start + (self.count - 1) * self.stride + self.length

    def update_at(self, position: int, accumulative_counts: int) -> int:
        """The number of the update, the first being 1, that consumed a position of this run."""
        return self.update + (self.micro + (position - self.start) // self.stride) // accumulative_counts + 1

    def precedes(self, other: "Run", accumulative_counts: int) -> bool:
        """Whether ``other`` goes on where this run ends, so that the two are one."""
        same = (self.segment, self.epoch, self.length, self.stride, self.indices, other.indices)
        micro = self.micro + self.count
        return (
            same == (other.segment, other.epoch, other.length, other.stride, None, None)
            and other.start == self.start + self.count * self.stride
            and other.iteration == self.iteration + self.count
            and (other.update - self.update, other.micro) == divmod(micro, accumulative_counts)
        )

    def extend(self, other: "Run") -> None:
        """Take in the run that follows."""
        self.count += other.count
        self.digest = (self.digest + other.digest) & _MASK64


def write_run(run: Run) -> list[Any]:
    """The plain form of a run: its fields in order, the digest as 16 hexadecimal digits."""
    values = list(astuple(run))
    values[9] = f"{run.digest:016x}"
    return values if run.indices is not None else values[:10]


def read_run(values: Any) -> Run:
    """Undo `write_run`. Raises CheckpointError for what it did not write."""
    try:
        return Run(*[*values[:9], int(values[9], 16), *values[10:]])
    except (TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"the ledger holds a malformed run {values!r} ({error})") from error


class Ledger:
    """Notes what the loop consumes; `Stateful`, so that a checkpoint holds the history of all that led to it.

    Args:
        stream: the training stream; its batches must carry readings (`Stream.report_readings`).
        accumulative_counts: micro-batches of one update.
    """

    def __init__(self, stream: Any, *, accumulative_counts: int = 1) -> None:
        self._spec: dict[str, Any] = {
            "world_size": dist.data_size(),
            "batch_size": stream.batch_size,
            "accumulative_counts": accumulative_counts,
            "order": dict(stream.sampler.order),
        }
        self._progress = Progress()
        self._segments: list[dict[str, Any]] = []
        self._history: list[Run] = []  # joined over ranks, up to the last save
        self._own: list[Run] = []  # this rank's since the last save
        self._ended: list[int] | None = None  # where the loaded history ends
        self._order: tuple[int, Order | None] = (-1, None)

    def begin(self, progress: Progress, *, moved_by: Any = None) -> None:
        """Note that the run goes on from ``progress``, which the loop advances from here on.

        ``moved_by`` is ``resume_data`` where it moved the data on purpose.
        """
        self._progress = progress
        here = [progress.epoch, progress.offset]
        last = self._segments[-1] if self._segments else {}
        if moved_by is None and here == self._ended and self._spec == {key: last.get(key) for key in self._spec}:
            return
        start = {"iteration": progress.iteration, "update": progress.update, "position": here}
        by = dict(moved_by) if isinstance(moved_by, Mapping) else moved_by
        moved = None if by is None else {"by": by, "left": self._ended}
        self._segments.append({**start, **self._spec, "moved": moved})

    def observe(self, batch: Batch, micro: int) -> None:
        """Note a batch that took part in the iteration in progress, the ``micro``-th of its window (from 0)."""
        if batch.weight == 0.0:
            return  # a stand-in: it changes nothing
        reading, progress, step = batch.reading, self._progress, self._spec["accumulative_counts"]
        assert reading is not None
        indices = np.frombuffer(reading.indices, dtype=np.int64)
        proof, odd = self._compare(reading.epoch, reading.start, indices)
        run = Run(
            len(self._segments) - 1, reading.epoch, reading.start, len(indices), batch.samples, 1,
            progress.iteration, progress.update, micro, proof, odd,
        )  # fmt: skip
        if self._own and self._own[-1].precedes(run, step):
            self._own[-1].extend(run)
        else:
            self._own.append(run)

    def _compare(self, epoch: int, start: int, indices: np.ndarray) -> tuple[int, list[int] | None]:
        """Return the digest where the indices are those of the order, else the indices.

        The order of a user's own sampler is not ours to compute: its positions are noted alone.
        """
        if "sampler" in self._spec["order"]:
            return 0, None
        if self._order[0] != epoch:
            self._order = (epoch, order_of(self._spec["order"], epoch))
        order = self._order[1]
        assert order is not None
        if np.array_equal(order.take(start, start + len(indices)), indices):
            return digest(start, indices), None
        return 0, indices.tolist()

    def state_dict(self) -> StateDict:
        """Join what the ranks noted since the last save to the history; a collective."""
        gathered = dist.gather_objects([write_run(run) for run in self._own])[:: dist.model_parallel()]
        self._own = []
        for run in join_ranks(read_run(values) for own in gathered for values in own):
            step = self._segments[run.segment]["accumulative_counts"]
            if self._history and self._history[-1].precedes(run, step):
                self._history[-1].extend(run)
            else:
                self._history.append(run)
        return {
            "format": FORMAT,
            "position": [self._progress.epoch, self._progress.offset],
            "segments": [dict(segment) for segment in self._segments],
            "runs": [write_run(run) for run in self._history],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with a checkpoint's history; what was noted after it was saved is forgotten with its updates."""
        check_format(state_dict)
        self._segments = [dict(segment) for segment in state_dict["segments"]]
        self._history = [read_run(values) for values in state_dict["runs"]]
        self._own = []
        self._ended = list(state_dict["position"])


def build_ledger(stream: Any, *, accumulative_counts: int) -> Ledger:
    """Make the ledger of a stream and let its batches carry readings.

    Raises:
        ConfigError: the stream's batches do not say which samples they hold.
    """
    stream.report_readings()
    if not hasattr(getattr(stream, "sampler", None), "order"):
        raise ConfigError(
            f"train_cfg.ledger: {type(stream).__name__} does not say in which order it reads; leave the ledger out, or "
            "give train_dataloader as a dict"
        )
    return Ledger(stream, accumulative_counts=accumulative_counts)


def check_format(record: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a ledger that this version cannot read."""
    if record.get("format") != FORMAT:
        raise CheckpointError(
            f"the checkpoint's ledger has format {record.get('format')!r}, this version of mmtrain reads {FORMAT}"
        )


def order_of(spec: Mapping[str, Any], epoch: int) -> Order:
    """The order of pass ``epoch`` that a segment's ``order`` describes."""
    return epoch_order(spec["size"], spec["seed"], epoch, shuffle=spec["shuffle"])


def join_ranks(runs: Iterable[Run]) -> list[Run]:
    """Join the runs of all ranks, in the order of iterations: the shares of one global batch lie side by side.

    What does not fit together, because a rank read something else than the others, stays as it is.
    """
    together: dict[tuple[int, ...], list[Run]] = {}
    for run in runs:
        key = (run.segment, run.iteration, run.epoch, run.stride, run.count, run.update, run.micro)
        together.setdefault(key, []).append(run)
    joined: list[Run] = []
    for place in sorted(together):
        group = sorted(together[place], key=lambda run: run.start)
        whole = replace(group[0])
        for run in group[1:]:
            if run.indices is None and whole.indices is None and run.start == whole.start + whole.length:
                whole.length += run.length
                whole.digest = (whole.digest + run.digest) & _MASK64
            else:
                joined.append(whole)
                whole = replace(run)
        joined.append(whole)
    return joined
