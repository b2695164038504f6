"""Plans one save after the other, and keeps what does not change: in a run the tensors are the same each time.

Sorting names, finding tied tensors and writing the headers of files takes 30 us a tensor. What a plan depends on is
looked at in every save (`facts`), and a section of which none of it changed gets the plan that it had.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from mmtrain.checkpoint.format.index import TensorEntry
from mmtrain.checkpoint.format.tensors import Layout
from mmtrain.checkpoint.sharding import collect
from mmtrain.checkpoint.topology.base import Topology
from mmtrain.checkpoint.write.facts import Facts, look_at
from mmtrain.checkpoint.write.plan import Plan, Sections, Writers, check_names, choose_writers, digest_of, plan_section
from mmtrain.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class _Known:
    """A plan without its tensors. ``places`` are the positions of each layout's tensors in the section."""

    facts: Facts
    writers: Mapping[str, int]
    layouts: list[Layout]
    places: list[list[int]]
    entries: dict[str, TensorEntry]


class Planner:
    """Plans the saves of one store. ``spread_sections``: see `choose_writers`."""

    def __init__(self, topology: Topology, spread_sections: Collection[str]) -> None:
        self._topology = topology
        self._spread_sections = spread_sections
        self._known: dict[str, _Known] = {}
        self._digests: list[str] = []
        self._writers: Writers = {}
        self._digest = ""
        self._looked: dict[str, tuple[Facts, list[Tensor]] | None] = {}

    def agree_on_writers(self, name: str, tensors: Sections, *, problem: str | None) -> Writers:
        """Check on all ranks that a save can begin, and choose the rank that writes each plain tensor; a collective.

        ``problem`` is what already keeps this rank from saving. Raises CheckpointError on every rank if one has a
        problem.
        """
        digest, sizes = "", None
        try:
            check_names(name, tensors)
            self._looked = {section: look_at(named) for section, named in tensors.items()}
            if self._is_unchanged():
                digest = self._digest
            else:
                digest, sizes = digest_of(tensors)
        except CheckpointError as error:
            problem = problem or str(error)
        gathered = self._topology.ranks.gather((digest, problem))
        for _, other in gathered:
            if other is not None:
                self._looked = {}
                raise CheckpointError(other)
        digests = [other for other, _ in gathered]
        if digests != self._digests:  # as on every other rank: a digest says all that the choice depends on
            sizes = digest_of(tensors)[1] if sizes is None else sizes
            self._writers = choose_writers(sizes, digests, self._topology, spread_sections=self._spread_sections)
            self._digests = digests
        self._digest = digest
        return self._writers

    def prepare(self, tensors: Sections) -> list[Layout]:
        """Plan the tensors of a later save, of which nothing is written yet; a collective.

        Raises CheckpointError if they cannot be saved, perhaps on this rank alone.
        """
        writers = self.agree_on_writers("checkpoint", tensors, problem=None)
        looked, self._looked = self._looked, {}
        return [
            layout
            for section, named in tensors.items()
            for layout in self._section(section, named, writers.get(section, {}), looked.get(section))[0]
        ]

    def plan(self, tensors: Sections, writers: Writers, *, state: Any, rng: Any) -> Plan:
        """What this rank will write; on disks that are not shared, a collective."""
        plan = Plan()
        rank = self._topology.ranks.rank
        looked, self._looked = self._looked, {}
        state = self._topology.state_on_leaders(state)
        for section, named in tensors.items():
            layouts, entries = self._section(section, named, writers.get(section, {}), looked.get(section))
            plan.large += layouts
            plan.index[section] = entries
        for section in self._known.keys() - tensors.keys():
            del self._known[section]
        if self._topology.is_leader:
            plan.add_tree("state", state)
        plan.add_tree(f"rng/rank_{rank:05d}", rng)
        return plan

    def _is_unchanged(self) -> bool:
        return self._looked.keys() == self._known.keys() and all(
            found is not None and found[0].same_as(self._known[section].facts)
            for section, found in self._looked.items()
        )

    def _section(
        self,
        section: str,
        named: Mapping[str, Tensor],
        writers: Mapping[str, int],
        looked: tuple[Facts, list[Tensor]] | None,
    ) -> tuple[list[Layout], dict[str, TensorEntry]]:
        known = self._known.get(section)
        if known is not None and looked is not None and writers is known.writers and looked[0].same_as(known.facts):
            parts = looked[1]
            filled = [
                replace(layout, tensors=tuple([parts[place] for place in places]))
                for layout, places in zip(known.layouts, known.places, strict=True)
            ]
            return filled, known.entries
        rank = self._topology.ranks.rank
        shards = collect(section, named, writers=writers, rank=rank)
        self._topology.assign_replicas(shards, named)
        layouts, entries = plan_section(section, shards, rank=rank)
        self._known.pop(section, None)
        if looked is not None:
            position = {name: number for number, name in enumerate(looked[0].names)}
            places = [[position[name] for name in layout.names] for layout in layouts]
            empty = [replace(layout, tensors=()) for layout in layouts]
            self._known[section] = _Known(looked[0], writers, empty, places, entries)
        return layouts, entries
