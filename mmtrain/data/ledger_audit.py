"""The audit of a ledger: which samples were lost or repeated, proven from the record and the order alone.

The order of every epoch is computed again from the seed, and with it the digest of each span, so nothing is trusted but
the indices that the readers reported. An epoch in which every position was read once, in one order, is clean. In any
other epoch the samples are counted one by one (two bytes of memory per sample).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmtrain.data.ledger import IterationSpan, check_format, digest, order_of, read_span
from mmtrain.data.permutation import EpochOrder, SequentialOrder
from mmtrain.errors import CheckpointError

NAMED = 10  # samples of each kind that are named per epoch
_CHUNK = 1 << 16
_MOST_EPOCHS = 10_000_000
_MOST_COUNTED = 1 << 33  # samples of one epoch; three bytes each


@dataclass(slots=True)
class EpochAudit:
    """What happened to the samples of one epoch.

    ``updates`` are the numbers of the first and last update, counted from 1. ``size`` is None if a user's sampler
    decides. ``unproven`` counts samples whose record contradicts the order or the position of the checkpoint.
    ``faults`` name samples; ``notices`` describe what is by design.
    """

    epoch: int
    updates: tuple[int, int] | None
    samples: int
    size: int | None
    finished: bool
    lost: int = 0
    repeated: int = 0
    unproven: int = 0
    faults: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


class _EpochRecord:
    """The spans of one epoch, and where it began and ended: positions [``floor``, ``end``) should have been read.

    ``last`` is the number of the segment in which the epoch ended, or has got to.
    """

    def __init__(
        self, segments: Sequence[Mapping[str, Any]], spans: list[IterationSpan], epoch: int, *, last: int
    ) -> None:
        self.epoch = epoch
        self.spans = spans
        self.segments = segments
        numbers = sorted({span.segment for span in spans}) or [last]
        self.specs: list[dict[str, Any]] = []  # the orders in which it was read; more than one after a new seed
        for number in numbers:
            if segments[number]["order"] not in self.specs:
                self.specs.append(dict(segments[number]["order"]))
        self._orders: dict[str, EpochOrder] = {}
        self.global_batch = max(_global_batch(segments[number]) for number in (numbers[-1], last))
        self.worlds = {segments[number]["world_size"] for number in numbers}
        self.custom = any("sampler" in spec for spec in self.specs)
        self.size: int | None = None if self.custom else max(spec["size"] for spec in self.specs)
        self.floor = 0
        self.end = self.covered = max((span.stop for span in spans), default=0)

    def step(self, span: IterationSpan) -> int:
        """Micro-batches per update in a span."""
        return int(self.segments[span.segment]["accumulative_counts"])

    def order(self, spec: Mapping[str, Any]) -> EpochOrder:
        """The order that a segment's ``order`` describes; of a user's sampler, position 7 counts as sample 7."""
        key = repr(sorted(spec.items()))
        if key not in self._orders:
            self._orders[key] = SequentialOrder() if self.custom else order_of(spec, self.epoch)
        return self._orders[key]

    def ranges(self, span: IterationSpan) -> Iterator[tuple[int, int]]:
        """The positions of a span as contiguous ranges [start, stop)."""
        if span.length == span.stride:
            contiguous = [(span.start, span.start + span.count * span.length)]
        else:
            starts = range(span.start, span.start + span.count * span.stride, span.stride)
            contiguous = [(start, start + span.length) for start in starts]
        for start, stop in contiguous:
            for at in range(start, stop, _CHUNK):
                yield at, min(at + _CHUNK, stop)

    def indices(self, span: IterationSpan) -> Iterator[tuple[int, np.ndarray]]:
        """The sample indices that a span read, in parts, each with the position of its first."""
        if span.indices is not None:
            yield span.start, np.array(span.indices, dtype=np.int64)
            return
        order = self.order(self.segments[span.segment]["order"])
        for start, stop in self.ranges(span):
            yield start, np.array(order.take(start, stop), dtype=np.int64)

    @property
    def clean(self) -> bool:
        """Whether the spans cover every position once, in one order."""
        if len(self.specs) > 1 or any(span.indices is not None for span in self.spans):
            return False
        reached = self.floor
        for start, stop in sorted(piece for span in self.spans for piece in self.ranges(span)):
            if start != reached:
                return False
            reached = stop
        return reached == self.end


def audit_ledger(ledger: Mapping[str, Any]) -> list[EpochAudit]:
    """Return the audit of every epoch, in the order of the run.

    An epoch that ``resume_data`` ended or restarted counts as a separate epoch. Raises CheckpointError for a ledger
    that cannot be read.
    """
    check_format(ledger)
    segments = ledger["segments"]
    spans = [read_span(values) for values in ledger["runs"]]
    _check_amount(ledger, spans)
    firsts = [number for number, segment in enumerate(segments) if number == 0 or segment["moved"] is not None]
    audits: list[EpochAudit] = []
    for number, first in enumerate(firsts):
        after = firsts[number + 1] if number + 1 < len(firsts) else len(segments)
        moved = segments[after]["moved"] if after < len(segments) else None
        between = [span for span in spans if first <= span.segment < after]
        end = ledger["position"] if moved is None else moved["left"]
        found = _audit_between_moves(segments[:after], first, between, end)
        if moved is not None and found and not found[-1].finished:
            found[-1].notices.append(f"left at sample {moved['left'][1]} by resume_data={moved['by']!r}")
        audits += found
    return audits


def _check_amount(ledger: Mapping[str, Any], spans: Sequence[IterationSpan]) -> None:
    """Raise CheckpointError for a ledger of more than its run can have read: auditing that may never end."""
    recorded = sum(span.length * span.count for span in spans)
    consumed = ledger.get("samples", recorded)  # those that the checkpoint's position counts
    if max([recorded, *(span.count for span in spans)]) > 2 * consumed + _CHUNK:
        raise CheckpointError(f"the ledger records {recorded} samples, but its run consumed {consumed}")
    epochs = max([ledger["position"][0], *(span.epoch for span in spans)])
    if epochs > _MOST_EPOCHS:
        raise CheckpointError(f"the ledger goes to epoch {epochs}, expected at most {_MOST_EPOCHS}")


def _audit_between_moves(
    segments: Sequence[Mapping[str, Any]], first: int, spans: list[IterationSpan], end: Sequence[int]
) -> list[EpochAudit]:
    """Audit the epochs from segment ``first`` to the last, between two deliberate moves of the data position."""
    begin, moved = segments[first]["position"], segments[first]["moved"]
    audits = []
    for epoch in sorted({*range(begin[0], end[0] + 1), *(span.epoch for span in spans)}):
        in_epoch = [span for span in spans if span.epoch == epoch]
        reached = [n for n in range(first, len(segments)) if segments[n]["position"] <= [epoch + 1, 0]]
        record = _EpochRecord(segments, in_epoch, epoch, last=reached[-1] if reached else first)
        record.floor = begin[1] if epoch == begin[0] else 0
        audit = _audit_epoch(record, finished=epoch < end[0], frontier=end[1] if epoch == end[0] else 0)
        if epoch == begin[0] and moved is not None:
            audit.notices.insert(0, f"entered at sample {record.floor} by resume_data={moved['by']!r}")
        elif record.floor:
            audit.notices.insert(0, f"the record begins at sample {record.floor}")
        if in_epoch or audit.lost or audit.finished:
            audits.append(audit)
    return audits


def _audit_epoch(record: _EpochRecord, *, finished: bool, frontier: int) -> EpochAudit:
    updates = [
        span.update_at(position, record.step(span)) for span in record.spans for position in (span.start, span.stop - 1)
    ]
    audit = EpochAudit(
        epoch=record.epoch,
        updates=(min(updates), max(updates)) if updates else None,
        samples=sum(span.length * span.count for span in record.spans),
        size=record.size,
        finished=finished,
    )
    _find_end(record, audit, frontier)
    _prove(record, audit)
    if not record.clean:
        _count(record, audit)
    return audit


def _find_end(record: _EpochRecord, audit: EpochAudit, frontier: int) -> None:
    """Set how far the epoch should have been read. What ``drop_last`` left out is a notice, and is not lost."""
    if not audit.finished:
        record.end = frontier
        if record.covered > frontier:
            audit.unproven += record.covered - frontier
            audit.faults.append(
                f"the checkpoint is at sample {frontier} of the epoch, but samples up to {record.covered} were read"
            )
    elif record.size is not None:
        left = record.size - record.covered
        if record.specs[-1]["drop_last"] and 0 < left < record.global_batch:
            audit.notices.append(f"{left} samples at the end were dropped by drop_last")
        else:
            record.end = record.size
    if record.custom:
        name = record.specs[-1].get("sampler")
        audit.notices.append(f"{name} decides what is read and may repeat a sample, so positions are counted instead")
        if len(record.worlds) > 1:
            audit.notices.append(
                f"{name} redistributed them when the world size changed; whether a sample was lost is unknown"
            )


def _global_batch(segment: Mapping[str, Any]) -> int:
    return int(segment["batch_size"]) * int(segment["world_size"])


def _prove(record: _EpochRecord, audit: EpochAudit) -> None:
    """Compute the digest of each span again from the order. If it differs, other samples were read than recorded."""
    if record.custom:
        return
    for span in record.spans:
        if span.indices is None and sum(digest(*part) for part in record.indices(span)) % (1 << 64) != span.digest:
            audit.unproven += span.length * span.count
            first, last = (span.update_at(position, record.step(span)) for position in (span.start, span.stop - 1))
            audit.faults.append(
                f"what updates {first} to {last} read at positions {span.start} to {span.stop - 1} is not what "
                "the seed's order has there"
            )


def _count(record: _EpochRecord, audit: EpochAudit) -> None:
    """Count every sample of an epoch that is not clean, and name those that were lost or repeated."""
    top = max((span.stop for span in record.spans), default=0)
    size = record.size if record.size is not None else max(top, record.end)
    if size > _MOST_COUNTED:
        raise CheckpointError(f"the {size} samples of epoch {record.epoch + 1} are too many to count one by one")
    counts = np.zeros(size, dtype=np.uint16)
    excused = np.zeros(size, dtype=bool)
    for span in record.spans:
        for _, indices in record.indices(span):
            inside = indices[(indices >= 0) & (indices < size)]
            if len(inside) < len(indices):
                audit.unproven += len(indices) - len(inside)
                audit.faults.append(f"indices were read that the dataset of {size} samples does not have")
            np.add.at(counts, inside, 1)
    excused[record.order(record.specs[0]).take(0, record.floor)] = True
    excused[record.order(record.specs[-1]).take(record.end, size)] = True  # not read yet, or dropped
    lost = np.flatnonzero((counts == 0) & ~excused)
    repeated = np.flatnonzero(counts > 1)
    audit.lost = len(lost)
    audit.repeated = len(repeated)
    for index, position in _positions(record, lost[:NAMED]):
        audit.faults.append(f"sample {index} was lost: position {position}, {_around(record, position)}")
    for index, updates in _readers(record, repeated[:NAMED]):
        audit.faults.append(f"sample {index} was repeated: read in {_updates(updates)}")
    unnamed = max(0, len(lost) - NAMED) + max(0, len(repeated) - NAMED)
    if unnamed:
        audit.faults.append(f"and {unnamed} more")


def _positions(record: _EpochRecord, wanted: np.ndarray) -> list[tuple[int, int]]:
    """Return each wanted sample with its position in the last order of the epoch."""
    order = record.order(record.specs[-1])
    found = []
    for start in range(0, record.end if len(wanted) else 0, _CHUNK):
        part = np.array(order.take(start, min(start + _CHUNK, record.end)), dtype=np.int64)
        found += [(int(part[at]), start + int(at)) for at in np.flatnonzero(np.isin(part, wanted))]
    return sorted(found, key=lambda pair: pair[1])


def _readers(record: _EpochRecord, wanted: np.ndarray) -> list[tuple[int, list[int]]]:
    """Return each wanted sample with the updates that read it."""
    found: dict[int, list[int]] = {int(index): [] for index in wanted}
    for span in record.spans if len(wanted) else ():
        for start, part in record.indices(span):
            for at in np.flatnonzero(np.isin(part, wanted)):
                found[int(part[at])].append(span.update_at(start + int(at), record.step(span)))
    return sorted(found.items())


def _around(record: _EpochRecord, position: int) -> str:
    """Return which update should have read a position, or between which ones it is."""
    before = [span for span in record.spans if span.start <= position]
    after = [span.update_at(span.start, record.step(span)) for span in record.spans if span.start > position]
    inside = [span for span in before if position < span.stop]
    if inside:
        return f"which update {inside[0].update_at(position, record.step(inside[0]))} was to read"
    earlier = [span.update_at(span.stop - 1, record.step(span)) for span in before]
    if earlier and after:
        return f"between updates {max(earlier)} and {min(after)}"
    return f"after update {max(earlier)}" if earlier else f"before update {min(after)}" if after else "never reached"


def _updates(numbers: Sequence[int]) -> str:
    """``update 3``, ``updates 3 and 5``."""
    unique = sorted(set(numbers))
    if len(unique) == 1:
        return f"update {unique[0]}" + (f", {len(numbers)} times" if len(numbers) > 1 else "")
    return f"updates {', '.join(map(str, unique[:-1]))} and {unique[-1]}"
