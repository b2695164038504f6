"""The account of a ledger: which samples were lost or repeated, proven from the record and the order alone.

The order of every pass is computed again from the seed, and each run's digest with it, so that nothing is taken on
trust but the indices that the readers reported. A pass in which every position was read once, in one order, is clean;
in any other the samples are counted one by one (two bytes of memory a sample).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmtrain.data.ledger import Run, check_format, digest, order_of, read_run

NAMED = 10  # samples named of each kind in a pass
_CHUNK = 1 << 16


@dataclass(slots=True)
class PassAccount:
    """What became of the samples of one pass.

    ``updates`` are the numbers of the first and last update, the first of the run being 1; ``size`` is None where a
    sampler of the user's decides. ``unproven`` counts samples whose record does not agree with the order or with the
    checkpoint's position. ``faults`` name samples, ``notices`` what is as it was meant to be.
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


class _Pass:
    """The runs of one pass, and where it began and ended: positions [``floor``, ``end``) should have been read.

    ``last`` is the segment in which the pass ended, as far as it has ended.
    """

    def __init__(self, segments: Sequence[Mapping[str, Any]], runs: list[Run], epoch: int, *, last: int) -> None:
        self.epoch, self.runs, self.segments = epoch, runs, segments
        numbers = sorted({run.segment for run in runs}) or [last]
        self.specs: list[dict[str, Any]] = []  # the orders in which it was read; more than one after a new seed
        for number in numbers:
            if segments[number]["order"] not in self.specs:
                self.specs.append(dict(segments[number]["order"]))
        self._orders: dict[str, Any] = {}
        self.global_batch = max(_global_batch(segments[number]) for number in (numbers[-1], last))
        self.worlds = {segments[number]["world_size"] for number in numbers}
        self.custom = any("sampler" in spec for spec in self.specs)
        self.size: int | None = None if self.custom else max(spec["size"] for spec in self.specs)
        self.floor = 0
        self.end = self.covered = max((run.stop for run in runs), default=0)

    def step(self, run: Run) -> int:
        return int(self.segments[run.segment]["accumulative_counts"])

    def order(self, spec: Mapping[str, Any]) -> Any:
        key = repr(sorted(spec.items()))
        if key not in self._orders:
            self._orders[key] = _AsItIs() if self.custom else order_of(spec, self.epoch)
        return self._orders[key]

    def pieces(self, run: Run) -> Iterator[tuple[int, int]]:
        """The positions of a run as contiguous ranges [start, stop)."""
        whole = run.length == run.stride
        lengths = [(run.start, run.start + run.count * run.length)] if whole else [
            (start, start + run.length) for start in range(run.start, run.start + run.count * run.stride, run.stride)
        ]  # fmt: skip
        for start, stop in lengths:
            for at in range(start, stop, _CHUNK):
                yield at, min(at + _CHUNK, stop)

    def indices(self, run: Run) -> Iterator[tuple[int, np.ndarray]]:
        """The sample indices that a run read, in parts, each with the position of its first."""
        if run.indices is not None:
            yield run.start, np.array(run.indices, dtype=np.int64)
            return
        order = self.order(self.segments[run.segment]["order"])
        for start, stop in self.pieces(run):
            yield start, np.array(order.take(start, stop), dtype=np.int64)

    @property
    def clean(self) -> bool:
        """Whether the runs cover the positions once each, in one order."""
        if len(self.specs) > 1 or any(run.indices is not None for run in self.runs):
            return False
        reached = self.floor
        for start, stop in sorted(piece for run in self.runs for piece in self.pieces(run)):
            if start != reached:
                return False
            reached = stop
        return reached == self.end


class _AsItIs:
    """The order of a user's sampler, as far as it is known: what stands at position 7 is called 7."""

    def take(self, start: int, stop: int) -> list[int]:
        return list(range(start, stop))


def account(record: Mapping[str, Any]) -> list[PassAccount]:
    """Return the account of every pass, in the order of the run.

    A pass that ``resume_data`` ended or began again counts as one of its own. Raises CheckpointError for a record that
    cannot be read.
    """
    check_format(record)
    segments = record["segments"]
    runs = [read_run(values) for values in record["runs"]]
    firsts = [number for number, segment in enumerate(segments) if number == 0 or segment["moved"] is not None]
    found: list[PassAccount] = []
    for number, first in enumerate(firsts):
        after = firsts[number + 1] if number + 1 < len(firsts) else len(segments)
        moved = segments[after]["moved"] if after < len(segments) else None
        own = [run for run in runs if first <= run.segment < after]
        passes = _course(segments[:after], first, own, record["position"] if moved is None else moved["left"])
        if moved is not None and passes and not passes[-1].finished:
            passes[-1].notices.append(f"left at sample {moved['left'][1]} by resume_data={moved['by']!r}")
        found += passes
    return found


def _course(
    segments: Sequence[Mapping[str, Any]], first: int, runs: list[Run], ended: Sequence[int]
) -> list[PassAccount]:
    """The passes from segment ``first`` to the last, between two places at which the data were moved on purpose."""
    begin, moved = segments[first]["position"], segments[first]["moved"]
    found = []
    for epoch in sorted({*range(begin[0], ended[0] + 1), *(run.epoch for run in runs)}):
        own = [run for run in runs if run.epoch == epoch]
        reached = [n for n in range(first, len(segments)) if segments[n]["position"] <= [epoch + 1, 0]]
        one = _Pass(segments, own, epoch, last=reached[-1] if reached else first)
        one.floor = begin[1] if epoch == begin[0] else 0
        made = _balance(one, finished=epoch < ended[0], frontier=ended[1] if epoch == ended[0] else 0)
        if epoch == begin[0] and moved is not None:
            made.notices.insert(0, f"entered at sample {one.floor} by resume_data={moved['by']!r}")
        elif one.floor:
            made.notices.insert(0, f"the record begins at sample {one.floor}")
        if own or made.lost or made.finished:
            found.append(made)
    return found


def _balance(one: _Pass, *, finished: bool, frontier: int) -> PassAccount:
    updates = [run.update_at(position, one.step(run)) for run in one.runs for position in (run.start, run.stop - 1)]
    made = PassAccount(
        epoch=one.epoch,
        updates=(min(updates), max(updates)) if updates else None,
        samples=sum(run.length * run.count for run in one.runs),
        size=one.size,
        finished=finished,
    )
    _find_end(one, made, frontier)
    _prove(one, made)
    if not one.clean:
        _count(one, made)
    return made


def _find_end(one: _Pass, made: PassAccount, frontier: int) -> None:
    """Set how far the pass should have been read; what ``drop_last`` left out is told, and is not lost."""
    if not made.finished:
        one.end = frontier
        if one.covered > frontier:
            made.unproven += one.covered - frontier
            made.faults.append(
                f"the checkpoint is at sample {frontier} of the epoch, but samples up to {one.covered} were read"
            )
    elif one.size is not None:
        left = one.size - one.covered
        if one.specs[-1]["drop_last"] and 0 < left < one.global_batch:
            made.notices.append(f"{left} samples at the end were dropped by drop_last")
        else:
            one.end = one.size
    if one.custom:
        name = one.specs[-1].get("sampler")
        made.notices.append(f"{name} decides what is read and may repeat a sample, so positions are counted instead")
        if len(one.worlds) > 1:
            made.notices.append(
                f"{name} redistributed them when the world size changed; whether a sample was lost is unknown"
            )


def _global_batch(segment: Mapping[str, Any]) -> int:
    return int(segment["batch_size"]) * int(segment["world_size"])


def _prove(one: _Pass, made: PassAccount) -> None:
    """Compute each run's digest again from the order; where it differs, other samples were read than it says."""
    if one.custom:
        return
    for run in one.runs:
        if run.indices is None and sum(digest(*part) for part in one.indices(run)) % (1 << 64) != run.digest:
            made.unproven += run.length * run.count
            first, last = (run.update_at(position, one.step(run)) for position in (run.start, run.stop - 1))
            made.faults.append(
                f"what updates {first} to {last} read at positions {run.start} to {run.stop - 1} is not what "
                "the seed's order has there"
            )


def _count(one: _Pass, made: PassAccount) -> None:
    """Count every sample of a pass that is not clean, and name those that were lost or repeated."""
    top = max((run.stop for run in one.runs), default=0)
    size = one.size if one.size is not None else max(top, one.end)
    counts, excused = np.zeros(size, dtype=np.uint16), np.zeros(size, dtype=bool)
    for run in one.runs:
        for _, indices in one.indices(run):
            inside = indices[(indices >= 0) & (indices < size)]
            if len(inside) < len(indices):
                made.unproven += len(indices) - len(inside)
                made.faults.append(f"indices were read that the dataset of {size} samples does not have")
            np.add.at(counts, inside, 1)
    excused[one.order(one.specs[0]).take(0, one.floor)] = True
    excused[one.order(one.specs[-1]).take(one.end, size)] = True  # still to come, or dropped
    lost, repeated = np.flatnonzero((counts == 0) & ~excused), np.flatnonzero(counts > 1)
    made.lost, made.repeated = len(lost), len(repeated)
    for index, position in _positions(one, lost[:NAMED]):
        made.faults.append(f"sample {index} was lost: position {position}, {_around(one, position)}")
    for index, updates in _readers(one, repeated[:NAMED]):
        made.faults.append(f"sample {index} was repeated: read in {_updates(updates)}")
    unnamed = max(0, len(lost) - NAMED) + max(0, len(repeated) - NAMED)
    if unnamed:
        made.faults.append(f"and {unnamed} more")


def _positions(one: _Pass, wanted: np.ndarray) -> list[tuple[int, int]]:
    """Each wanted sample with its position in the last order of the pass."""
    order, found = one.order(one.specs[-1]), []
    for start in range(0, one.end if len(wanted) else 0, _CHUNK):
        part = np.array(order.take(start, min(start + _CHUNK, one.end)), dtype=np.int64)
        found += [(int(part[at]), start + int(at)) for at in np.flatnonzero(np.isin(part, wanted))]
    return sorted(found, key=lambda pair: pair[1])


def _readers(one: _Pass, wanted: np.ndarray) -> list[tuple[int, list[int]]]:
    """Each wanted sample with the updates that read it."""
    found: dict[int, list[int]] = {int(index): [] for index in wanted}
    for run in one.runs if len(wanted) else ():
        for start, part in one.indices(run):
            for at in np.flatnonzero(np.isin(part, wanted)):
                found[int(part[at])].append(run.update_at(start + int(at), one.step(run)))
    return sorted(found.items())


def _around(one: _Pass, position: int) -> str:
    """Which update should have read a position, or between which ones it lies."""
    before = [run for run in one.runs if run.start <= position]
    after = [run.update_at(run.start, one.step(run)) for run in one.runs if run.start > position]
    inside = [run for run in before if position < run.stop]
    if inside:
        return f"which update {inside[0].update_at(position, one.step(inside[0]))} was to read"
    earlier = [run.update_at(run.stop - 1, one.step(run)) for run in before]
    if earlier and after:
        return f"between updates {max(earlier)} and {min(after)}"
    return f"after update {max(earlier)}" if earlier else f"before update {min(after)}" if after else "never reached"


def _updates(numbers: Sequence[int]) -> str:
    """``update 3``, ``updates 3 and 5``."""
    unique = sorted(set(numbers))
    if len(unique) == 1:
        return f"update {unique[0]}" + (f", {len(numbers)} times" if len(numbers) > 1 else "")
    return f"updates {', '.join(map(str, unique[:-1]))} and {unique[-1]}"
