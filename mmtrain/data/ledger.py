"""The ledger of a run: which samples each update consumed, as run-length records.

A raw list of samples would not compress, because an epoch is shuffled; positions in the order of the epoch do. For
every batch that the train loop consumed, the ledger compares the sample indices that the reader reported with the order
that it computes itself, and records the positions: an `IterationSpan` grows by one iteration as long as batches follow
one another. A batch whose indices differ from those at its positions is recorded with its indices. So the record takes
a few lines per epoch, however many samples it has, and `ledger_audit` can prove it: each span has a digest of its
(position, index) pairs, which only the right order reproduces.

Every rank records its part; a save gathers and joins the parts, so that all ranks have the same history.
"""

from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np

from mmtrain import dist
from mmtrain.data.permutation import EpochOrder, epoch_order, scramble
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
class IterationSpan:
    """Consecutive iterations that read consecutive positions.

    Iteration k of the span (0 <= k < ``count``) is iteration ``iteration + k`` of the run. It reads ``length``
    positions of epoch ``epoch`` from ``start + k * stride`` on; ``stride`` is what all ranks together consume in it.
    ``update`` is the number of optimizer steps applied before the span, ``micro`` the number of iterations of the
    accumulation window done before it. ``indices`` are present only if they differ from those at the positions.
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
        """The position after the last one."""
        return self.start + (self.count - 1) * self.stride + self.length

    def update_at(self, position: int, accumulative_counts: int) -> int:
        """Return the number of the update, counted from 1, that consumed a position of this span."""
        return self.update + (self.micro + (position - self.start) // self.stride) // accumulative_counts + 1

    def precedes(self, other: "IterationSpan", accumulative_counts: int) -> bool:
        """Whether ``other`` continues this span, so that the two can be joined."""
        same = (self.segment, self.epoch, self.length, self.stride, self.indices, other.indices)
        micro = self.micro + self.count
        return (
            same == (other.segment, other.epoch, other.length, other.stride, None, None)
            and other.start == self.start + self.count * self.stride
            and other.iteration == self.iteration + self.count
            and (other.update - self.update, other.micro) == divmod(micro, accumulative_counts)
        )

    def extend(self, other: "IterationSpan") -> None:
        """Append the span that continues this one."""
        self.count += other.count
        self.digest = (self.digest + other.digest) & _MASK64


def write_span(span: IterationSpan) -> list[Any]:
    """Return a span as plain values: its fields in order, the digest as 16 hexadecimal digits."""
    values = list(astuple(span))
    values[9] = f"{span.digest:016x}"
    return values if span.indices is not None else values[:10]


def read_span(values: Any) -> IterationSpan:
    """Return the span that `write_span` wrote. Raises CheckpointError for anything else."""
    try:
        return IterationSpan(*[*values[:9], int(values[9], 16), *values[10:]])
    except (TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"the checkpoint's ledger has a malformed entry {values!r} ({error})") from error


class Ledger:
    """Records what the train loop consumes. Its state is the history of all starts that led to a checkpoint.

    Args:
        stream: the training stream; its batches must have indices (`Stream.report_indices`).
        accumulative_counts: micro-batches per update.
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
        self._history: list[IterationSpan] = []  # joined over ranks, up to the last save
        self._recent: list[IterationSpan] = []  # this rank's since the last save
        self._loaded_end: list[int] | None = None  # the position at which the loaded history ends
        self._order: tuple[int, EpochOrder | None] = (-1, None)

    def begin(self, progress: Progress, *, moved_by: Any = None) -> None:
        """Record that the run continues at ``progress``, which the train loop advances from now on.

        ``moved_by`` is ``resume_data`` if it moved the data position deliberately.
        """
        self._progress = progress
        here = [progress.epoch, progress.offset]
        last = self._segments[-1] if self._segments else {}
        if moved_by is None and here == self._loaded_end and self._spec == {key: last.get(key) for key in self._spec}:
            return
        start = {"iteration": progress.iteration, "update": progress.update, "position": here}
        by = dict(moved_by) if isinstance(moved_by, Mapping) else moved_by
        moved = None if by is None else {"by": by, "left": self._loaded_end}
        self._segments.append({**start, **self._spec, "moved": moved})

    def observe(self, batch: Batch, *, iteration: int, update: int, micro: int) -> None:
        """Record a batch that took part in an iteration.

        Args:
            batch: the batch, with its indices.
            iteration: the 0-based index of the iteration in the run.
            update: the optimizer steps that were applied before the iteration's window.
            micro: the 0-based index of the iteration in its window.
        """
        if batch.weight == 0.0:
            return  # a stand-in, which has no effect
        read = batch.indices
        assert read is not None
        indices = np.frombuffer(read.values, dtype=np.int64)
        proof, unexpected = self._compare(read.epoch, read.start, indices)
        span = IterationSpan(
            segment=len(self._segments) - 1,
            epoch=read.epoch,
            start=read.start,
            length=len(indices),
            stride=batch.samples,
            count=1,
            iteration=iteration,
            update=update,
            micro=micro,
            digest=proof,
            indices=unexpected,
        )
        if self._recent and self._recent[-1].precedes(span, self._spec["accumulative_counts"]):
            self._recent[-1].extend(span)
        else:
            self._recent.append(span)

    def _compare(self, epoch: int, start: int, indices: np.ndarray) -> tuple[int, list[int] | None]:
        """Return the digest if the indices are those of the order, otherwise the indices.

        The order of a user's sampler cannot be computed here: only its positions are recorded.
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
        """Add what the ranks recorded since the last save to the history and return it; a collective."""
        gathered = dist.gather_objects([write_span(span) for span in self._recent])[:: dist.model_parallel()]
        self._recent = []
        for span in join_ranks(read_span(values) for part in gathered for values in part):
            step = self._segments[span.segment]["accumulative_counts"]
            if self._history and self._history[-1].precedes(span, step):
                self._history[-1].extend(span)
            else:
                self._history.append(span)
        return {
            "format": FORMAT,
            "position": [self._progress.epoch, self._progress.offset],
            "segments": [dict(segment) for segment in self._segments],
            "runs": [write_span(span) for span in self._history],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue the history of a checkpoint. What was recorded after it was saved is dropped with its updates."""
        check_format(state_dict)
        self._segments = [dict(segment) for segment in state_dict["segments"]]
        self._history = [read_span(values) for values in state_dict["runs"]]
        self._recent = []
        self._loaded_end = list(state_dict["position"])


def build_ledger(stream: Any, *, accumulative_counts: int) -> Ledger:
    """Make the ledger of a stream, and let the stream's batches have indices.

    Raises:
        ConfigError: the sample indices of the stream's batches, or their order, are unknown.
    """
    stream.report_indices()
    if not hasattr(getattr(stream, "sampler", None), "order"):
        raise ConfigError(
            f"train_cfg.ledger: the order in which {type(stream).__name__} reads its samples is unknown; leave the "
            "ledger out, or set train_dataloader to a dict"
        )
    return Ledger(stream, accumulative_counts=accumulative_counts)


def check_format(record: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a ledger that this version cannot read."""
    if record.get("format") != FORMAT:
        raise CheckpointError(
            f"the checkpoint's ledger has format {record.get('format')!r}, this version of mmtrain reads {FORMAT}"
        )


def order_of(spec: Mapping[str, Any], epoch: int) -> EpochOrder:
    """Return the order of an epoch that a segment's ``order`` describes."""
    return epoch_order(spec["size"], spec["seed"], epoch, shuffle=spec["shuffle"])


def join_ranks(spans: Iterable[IterationSpan]) -> list[IterationSpan]:
    """Join the spans of all ranks in the order of iterations: the parts of a global batch are next to each other.

    Spans that do not fit together, because a rank read something else than the others, stay separate.
    """
    together: dict[tuple[int, ...], list[IterationSpan]] = {}
    for span in spans:
        key = (span.segment, span.iteration, span.epoch, span.stride, span.count, span.update, span.micro)
        together.setdefault(key, []).append(span)
    joined: list[IterationSpan] = []
    for same_iteration in sorted(together):
        group = sorted(together[same_iteration], key=lambda span: span.start)
        merged = replace(group[0])
        for span in group[1:]:
            if span.indices is None and merged.indices is None and span.start == merged.start + merged.length:
                merged.length += span.length
                merged.digest = (merged.digest + span.digest) & _MASK64
            else:
                joined.append(merged)
                merged = replace(span)
        joined.append(merged)
    return joined
