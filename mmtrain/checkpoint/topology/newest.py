"""Which checkpoint is good on every disk, where the ranks do not share one: every leader looks, all decide alike."""

from collections.abc import Sequence
from pathlib import Path

from mmtrain.checkpoint import discover as catalog
from mmtrain.checkpoint.format.manifest import MANIFEST
from mmtrain.checkpoint.format.verify import Problem, Verify
from mmtrain.checkpoint.retention import Entry, RetirePolicy, to_delete
from mmtrain.checkpoint.topology.ranks import Ranks
from mmtrain.files import hash_file

Saves = dict[str, tuple[Entry, str]]  # name -> the checkpoint, and the hash of its manifest: the same for one save


def newest_on_all(root: Path, ranks: Ranks, *, verify: Verify) -> tuple[str | None, list[Problem]]:
    """The newest checkpoint whose parts all verify, or None, and what is wrong with those passed over; a collective.

    Parts belong together only if their manifests are the same: after a kill between two renames one disk may hold an
    earlier save of the same name.
    """
    seen, problems = _all_saves(root, ranks)
    leaders, told = sorted(seen), {problem.checkpoint for problem in problems}
    newest: dict[str, Entry] = {}
    for saves in seen.values():
        for name, (entry, _) in saves.items():
            newest[name] = max(newest.get(name, entry), entry, key=catalog.age)
    for entry in sorted(newest.values(), key=catalog.age, reverse=True):
        held = {leader: seen[leader].get(entry.name) for leader in leaders}
        absent = [ranks.disks.told(leader) for leader, save in held.items() if save is None]
        if absent:
            if entry.name not in told:
                problems.append(Problem(entry.name, MANIFEST, f"missing on {_and(absent)}; other disks have it"))
            continue
        if len({save[1] for save in held.values() if save is not None}) > 1:
            which = _and([ranks.disks.told(leader) for leader in leaders])
            problems.append(Problem(entry.name, MANIFEST, f"{which} hold it from different saves"))
            continue
        faults = _faults(root / entry.name, ranks, verify)
        if not faults:
            return entry.name, problems
        problems += faults
    return None, problems


def entries_on_all(root: Path, ranks: Ranks) -> list[Entry]:
    """The complete checkpoints that every disk has from the same save, in ascending order; a collective."""
    own: list[Entry] | None = None
    if ranks.leader:
        try:
            own = catalog.scan(root)[0]
        except OSError:  # nobody knows what is there: retention has nothing to choose from
            own = []
    everyone = ranks.gather(own)
    others = [set(held) for held in everyone if held is not None]
    return [entry for entry in everyone[0] or [] if all(entry in held for held in others)]


def names_to_delete(root: Path, ranks: Ranks, retire: RetirePolicy) -> list[str]:
    """What ``retire`` deletes on this rank's disk.

    On a shared disk rank 0 alone calls this. With several disks it is a collective: rank 0 decides, by the checkpoints
    that every disk has, and each leader gets the names.
    """
    if ranks.disks.one:
        return to_delete(catalog.scan(root)[0], retire.keep, retire.protected)
    common = entries_on_all(root, ranks)
    names = ranks.on_main(lambda: to_delete(common, retire.keep, retire.protected))
    return names if ranks.leader else []


def manifest_hash(directory: Path) -> str:
    """What tells one save from another of the same name. Raises OSError where there is no manifest."""
    return hash_file(directory / MANIFEST)


def _all_saves(root: Path, ranks: Ranks) -> tuple[dict[int, Saves], list[Problem]]:
    """What each leader finds in its directory; an unreadable manifest is a problem, and the rest does not count."""

    def look() -> tuple[Saves, list[Problem]]:
        try:
            entries, problems = catalog.scan(root, verify="none")
            return {entry.name: (entry, manifest_hash(root / entry.name)) for entry in entries}, problems
        except OSError as error:
            return {}, [Problem(str(root), "", f"cannot be read ({error})")]

    everyone = ranks.gather(look() if ranks.leader else None)
    problems = [
        _at(problem, ranks, rank) for rank, found in enumerate(everyone) if found is not None for problem in found[1]
    ]
    return {rank: found[0] for rank, found in enumerate(everyone) if found is not None}, problems


def _faults(path: Path, ranks: Ranks, verify: Verify) -> list[Problem]:
    """What each leader finds wrong with its own part."""
    found = ranks.gather(catalog.inspect(path, verify=verify)[1] if ranks.leader else [])
    return [_at(problem, ranks, rank) for rank, faults in enumerate(found) for problem in faults]


def _at(problem: Problem, ranks: Ranks, rank: int) -> Problem:
    return Problem(problem.checkpoint, problem.file, f"{problem.fault} (on {ranks.disks.told(rank)})")


def _and(names: Sequence[str]) -> str:
    return " and ".join(names)
