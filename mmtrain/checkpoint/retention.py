"""Which checkpoints are deleted: a pure function of those that exist and of the policy."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Entry:
    """A complete checkpoint as retention and listings see it.

    ``temporary``: saved by the clock; ``in_epoch``: saved inside an epoch, not at its end;
    ``generation`` and ``run``: see `mmtrain.checkpoint.format.manifest.Manifest`; ``is_original``: under the name that
    it was saved under, not a copy, a renamed one or a link, which are the user's.
    """

    name: str
    iteration: int
    epoch: int
    temporary: bool = False
    created: str = ""
    bytes: int = 0
    in_epoch: bool = False
    generation: int = 0
    run: str = ""
    is_original: bool = True


@dataclass(frozen=True, slots=True)
class Retention:
    """How many checkpoints are kept.

    * ``max_keep_ckpts``: this many of the newest permanent ones, 0 or less for all (MMEngine's name and meaning);
    * ``keep_every``: those whose ``unit`` count is a multiple of it, always, and not counted above; 0 for none;
    * ``keep_temporary``: this many of the newest temporary ones, if no permanent one is newer;
    * ``since``: checkpoints of earlier generations belong to another run and are kept;
    * ``run``: so do checkpoints that another run saved; None for those of any run.

    What a user copied, renamed or linked is neither deleted nor counted.
    """

    max_keep_ckpts: int = -1
    keep_every: int = 0
    unit: Literal["iteration", "epoch"] = "iteration"
    keep_temporary: int = 1
    since: int = 0
    run: str | None = None


@dataclass(frozen=True, slots=True)
class RetirePolicy:
    """What a save or a pruning may delete: the checkpoints that ``keep`` does not keep and ``protected`` does not name.

    A save is given one as a value, so nothing that changes later, in another thread, reaches a save in flight.
    """

    keep: Retention = Retention()
    protected: frozenset[str] = frozenset()


def to_delete(entries: Sequence[Entry], policy: Retention, protected: Collection[str] = ()) -> list[str]:
    """Return the names to delete, oldest first. ``entries`` are complete checkpoints in ascending order.

    The newest one is kept whatever the policy says, so there is always at least one good checkpoint; so are those in
    ``protected`` (the best one, the one a user named). A protected one counts toward ``max_keep_ckpts`` if it is among
    the newest.
    """
    entries = [entry for entry in entries if _is_subject(entry, policy)]
    if not entries:
        return []
    newest = entries[-1].name
    permanent = [e for e in entries if not e.temporary and not _multiple(e, policy)]
    multiples = [e for e in entries if not e.temporary and _multiple(e, policy)]
    kept = {newest, *protected, *(e.name for e in multiples)}
    kept |= {e.name for e in _last(permanent, policy.max_keep_ckpts or -1)}
    last_permanent = max((i for i, e in enumerate(entries) if not e.temporary), default=-1)
    fresh = [e for i, e in enumerate(entries) if e.temporary and i > last_permanent]
    kept |= {e.name for e in _last(fresh, policy.keep_temporary)}
    return [e.name for e in entries if e.name not in kept]


def _is_subject(entry: Entry, policy: Retention) -> bool:
    return entry.is_original and entry.generation >= policy.since and policy.run in (None, entry.run)


def _multiple(entry: Entry, policy: Retention) -> bool:
    if policy.unit == "epoch" and entry.in_epoch:
        return False
    count = entry.iteration if policy.unit == "iteration" else entry.epoch
    return policy.keep_every > 0 and count > 0 and count % policy.keep_every == 0


def _last(entries: Sequence[Entry], count: int) -> Sequence[Entry]:
    if count < 0:
        return entries
    return entries[len(entries) - min(count, len(entries)) :]
