"""One disk that all ranks see: rank 0 is the leader."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from mmtrain import dist
from mmtrain.checkpoint import discover
from mmtrain.checkpoint.format.index import Index, merge
from mmtrain.checkpoint.format.manifest import FileRecord, Manifest
from mmtrain.checkpoint.format.verify import Problem, Verify
from mmtrain.checkpoint.inventory import Inventory
from mmtrain.checkpoint.reader import Checkpoint
from mmtrain.checkpoint.retention import Entry, RetirePolicy
from mmtrain.checkpoint.sharding import LocalShards
from mmtrain.checkpoint.topology.base import Topology
from mmtrain.checkpoint.topology.disks import Disks

T = TypeVar("T")


class SharedDisk(Topology):
    """All ranks write into the same directory."""

    is_divided = False

    def __init__(self) -> None:
        super().__init__(Disks.shared(dist.world_size()))

    def on_leaders(self, function: Callable[[], T]) -> T:
        return self.ranks.on_main(function)

    def gather_on_leaders(self, value: T) -> list[T]:
        return self.ranks.gather_on_main(value)

    def newest_good(self, root: Path, *, verify: Verify, clear: Callable[[], Any]) -> tuple[str | None, list[Problem]]:
        def look() -> tuple[Entry | None, list[Problem]]:
            clear()
            return discover.newest_good(root, verify=verify)

        entry, problems = self.ranks.on_main(look)
        return (None if entry is None else entry.name), problems

    def newest_entry(self, root: Path) -> Entry | None:
        return self.ranks.on_main(lambda: next(reversed(discover.scan(root)[0]), None))

    def names_to_delete(self, inventory: Inventory, retire: RetirePolicy) -> list[str]:
        return inventory.names_to_delete(retire) if self.ranks.is_main else []

    def read_rng(self, checkpoint: Checkpoint) -> Any:
        return checkpoint.rng(self.ranks.rank)

    def same_manifest(self, manifest: Manifest) -> Manifest:
        return manifest  # rank 0 alone writes it

    def state_on_leaders(self, state: Any) -> Any:
        return state if self.ranks.is_main else None

    def assign_replicas(self, shards: LocalShards, tensors: Mapping[str, Tensor]) -> None:
        """The lowest rank of all writes, as `collect` has set it."""

    def merge_indexes(self, indexes: Sequence[Index]) -> Index:
        return merge(indexes)

    def list_files(
        self, manifest: Manifest, written: Sequence[Mapping[str, FileRecord]], common: Mapping[str, FileRecord]
    ) -> None:
        files = {path: record for records in written for path, record in records.items()}
        manifest.files = dict(sorted({**files, **common}.items()))

    def markers(self) -> Iterable[tuple[str, bytes]]:
        return ()
