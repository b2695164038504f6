"""Several disks: each keeps, under the same name, the part of a checkpoint that its ranks need."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from mmtrain.checkpoint import discover
from mmtrain.checkpoint.format.index import Index, merge
from mmtrain.checkpoint.format.manifest import FileRecord, Manifest
from mmtrain.checkpoint.format.verify import Problem, Verify
from mmtrain.checkpoint.inventory import Inventory
from mmtrain.checkpoint.reader import Checkpoint
from mmtrain.checkpoint.retention import Entry, RetirePolicy
from mmtrain.checkpoint.sharding import LocalShards
from mmtrain.checkpoint.topology import disk_parts, newest
from mmtrain.checkpoint.topology.base import Topology
from mmtrain.dtensor import is_dtensor, ranks_with_same_shard

T = TypeVar("T")


class DividedDisks(Topology):
    """Each disk holds the files of its ranks; `disk_parts` says what goes to which disk."""

    is_divided = True

    def on_leaders(self, function: Callable[[], T]) -> T:
        outcome: tuple[Any, Exception | None] = (None, None)
        if self.is_leader:
            try:
                outcome = (function(), None)
            except Exception as error:
                outcome = (None, error)
        outcomes = self.ranks.gather(outcome)
        for rank, (_, failure) in enumerate(outcomes):
            if failure is not None:
                raise self.disks.with_rank(rank, failure)
        return outcomes[self.disk_ranks[0]][0]

    def gather_on_leaders(self, value: T) -> list[T]:
        return self.ranks.gather(value)

    def newest_good(self, root: Path, *, verify: Verify, clear: Callable[[], Any]) -> tuple[str | None, list[Problem]]:
        self.on_leaders(clear)
        return newest.newest_on_all(root, self, verify=verify)

    def newest_entry(self, root: Path) -> Entry | None:
        found = self.on_leaders(lambda: discover.scan(root)[0][-1:])
        entries = [entry for held in self.ranks.gather(found) for entry in held]
        return max(entries, key=discover.age, default=None)

    def names_to_delete(self, inventory: Inventory, retire: RetirePolicy) -> list[str]:
        """Rank 0 decides, by the checkpoints that every disk has."""
        names = newest.names_to_delete_on_all(inventory, self, retire)
        return names if self.is_leader else []

    def read_rng(self, checkpoint: Checkpoint) -> Any:
        held: dict[int, Any] = {}
        if self.is_leader:
            found = {rank: checkpoint.rng(rank) for rank in range(self.ranks.size)}
            held = {rank: value for rank, value in found.items() if value is not None}
        rank = self.ranks.rank
        return next((values[rank] for values in self.ranks.gather(held) if rank in values), None)

    def same_manifest(self, manifest: Manifest) -> Manifest:
        return self.ranks.on_main(lambda: manifest)

    def state_on_leaders(self, state: Any) -> Any:
        return disk_parts.state_of_main(state, self)

    def assign_replicas(self, shards: LocalShards, tensors: Mapping[str, Tensor]) -> None:
        """The lowest rank of this disk that holds a replicated shard writes it, not the lowest of all."""
        for number, shard in enumerate(shards.shards):
            if shard.name in shards.aliases or not is_dtensor(tensors[shard.name]):
                continue
            same_shard = ranks_with_same_shard(tensors[shard.name])
            if same_shard:
                shards.is_writer[number] = self.ranks.rank == min(set(same_shard) & set(self.disk_ranks))

    def merge_indexes(self, indexes: Sequence[Index]) -> Index:
        return merge(indexes, copies=True)

    def list_files(
        self, manifest: Manifest, written: Sequence[Mapping[str, FileRecord]], common: Mapping[str, FileRecord]
    ) -> None:
        manifest.files, manifest.parts = disk_parts.divide(written, self.disks, common)

    def markers(self) -> Iterable[tuple[str, bytes]]:
        return ((path, data) for path, ranks, data in disk_parts.markers(self.disks) if self.ranks.rank in ranks)
