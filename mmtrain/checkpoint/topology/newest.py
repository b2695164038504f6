"""Which checkpoint is good on every disk: each leader looks at its own, and all ranks reach the same decision."""

from collections.abc import Iterable
from pathlib import Path

from mmtrain.checkpoint import discover
from mmtrain.checkpoint.format.manifest import MANIFEST
from mmtrain.checkpoint.format.verify import Problem, Verify
from mmtrain.checkpoint.inventory import ROUNDS, Inventory, decisive
from mmtrain.checkpoint.retention import Entry, RetirePolicy, to_delete
from mmtrain.checkpoint.topology.base import Topology
from mmtrain.files import hash_file

Saves = dict[str, tuple[Entry, str]]  # name -> the checkpoint, and the hash of its manifest: the same for one save


def newest_on_all(root: Path, topology: Topology, *, verify: Verify) -> tuple[str | None, list[Problem]]:
    """The newest checkpoint whose parts all verify, or None, and what is wrong with newer ones; a collective.

    Parts belong together only if their manifests are the same: after a kill between two renames one disk may hold an
    earlier save of the same name.
    """
    saves_by_leader, problems = _all_saves(root, topology)
    reported = {problem.checkpoint for problem in problems}
    newest: dict[str, Entry] = {}
    for saves in saves_by_leader.values():
        for name, (entry, _) in saves.items():
            newest[name] = max(newest.get(name, entry), entry, key=discover.age)
    for entry in sorted(newest.values(), key=discover.age, reverse=True):
        held = {leader: saves.get(entry.name) for leader, saves in sorted(saves_by_leader.items())}
        absent = [leader for leader, save in held.items() if save is None]
        if absent:
            if entry.name not in reported:
                fault = f"missing on {_disks(topology, absent)}; other disks have it"
                problems.append(Problem(entry.name, MANIFEST, fault))
            continue
        if len({save[1] for save in held.values() if save is not None}) > 1:
            problems.append(Problem(entry.name, MANIFEST, f"{_disks(topology, held)} have different saves of it"))
            continue
        faults = _faults(root / entry.name, topology, verify)
        if not faults:
            return entry.name, problems
        problems += faults
    return None, problems


def names_to_delete_on_all(inventory: Inventory, topology: Topology, retire: RetirePolicy) -> list[str]:
    """What ``retire`` deletes of the checkpoints that every disk has from the same save; a collective.

    Rank 0 decides; as in `Inventory.names_to_delete`, every leader looks again at what the decision rests on.
    """
    for _ in range(ROUNDS):
        common = _entries_on_all(inventory, topology)
        names, rests_on = topology.ranks.on_main(lambda: _decide(common, retire))  # noqa: B023 - it is called here
        is_same = not topology.is_leader or inventory.confirm(rests_on)
        if all(topology.ranks.gather(is_same)):
            return names
    return []


def _decide(entries: list[Entry], retire: RetirePolicy) -> tuple[list[str], list[str]]:
    names = to_delete(entries, retire.keep, retire.protected)
    return names, decisive(entries, names, retire.keep)


def _entries_on_all(inventory: Inventory, topology: Topology) -> list[Entry]:
    """The complete checkpoints that every disk has from the same save, in ascending order; a collective."""
    own: list[Entry] | None = None
    if topology.is_leader:
        try:
            own = inventory.entries()
        except OSError:  # what is there is unknown: retention has nothing to choose from
            own = []
    found = topology.ranks.gather(own)
    sets = [set(entries) for entries in found if entries is not None]
    return [entry for entry in found[0] or [] if all(entry in entries for entries in sets)]


def manifest_hash(directory: Path) -> str:
    """What distinguishes one save from another of the same name. Raises OSError if there is no manifest."""
    return hash_file(directory / MANIFEST)


def _all_saves(root: Path, topology: Topology) -> tuple[dict[int, Saves], list[Problem]]:
    """What each leader finds in its directory. A checkpoint with an unreadable manifest is a problem, not a save."""

    def look() -> tuple[Saves, list[Problem]]:
        try:
            entries, problems = discover.scan(root, verify="none")
            return {entry.name: (entry, manifest_hash(root / entry.name)) for entry in entries}, problems
        except OSError as error:
            return {}, [Problem(str(root), "", f"cannot be read ({error})")]

    gathered = topology.ranks.gather(look() if topology.is_leader else None)
    found = {rank: result for rank, result in enumerate(gathered) if result is not None}
    problems = [_on_disk(problem, topology, rank) for rank, (_, faults) in found.items() for problem in faults]
    return {rank: saves for rank, (saves, _) in found.items()}, problems


def _faults(path: Path, topology: Topology, verify: Verify) -> list[Problem]:
    """What each leader finds wrong with its part."""
    found = topology.ranks.gather(discover.inspect(path, verify=verify)[1] if topology.is_leader else [])
    return [_on_disk(problem, topology, rank) for rank, faults in enumerate(found) for problem in faults]


def _on_disk(problem: Problem, topology: Topology, rank: int) -> Problem:
    return Problem(problem.checkpoint, problem.file, f"{problem.fault} (on {topology.disks.describe(rank)})")


def _disks(topology: Topology, leaders: Iterable[int]) -> str:
    return " and ".join(topology.disks.describe(leader) for leader in leaders)
