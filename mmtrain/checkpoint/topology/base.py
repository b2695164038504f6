"""What depends on whether ranks share a disk: who writes, verifies and deletes what."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from mmtrain.checkpoint.format.index import Index
from mmtrain.checkpoint.format.manifest import FileRecord, Manifest
from mmtrain.checkpoint.format.verify import Problem, Verify
from mmtrain.checkpoint.inventory import Inventory
from mmtrain.checkpoint.reader import Checkpoint
from mmtrain.checkpoint.retention import Entry, RetirePolicy
from mmtrain.checkpoint.sharding import LocalShards
from mmtrain.checkpoint.topology.disks import Disks
from mmtrain.checkpoint.topology.ranks import Ranks

T = TypeVar("T")


class Topology(ABC):
    """The ranks that write a checkpoint together, and the disks they write to.

    Making one is a collective of all processes, and so is every method unless it says otherwise. Each disk has a
    leader, the lowest of the ranks that share it: it writes the manifest there, renames, verifies and deletes.
    """

    is_divided: bool

    def __init__(self, disks: Disks) -> None:
        self.disks = disks
        self.ranks = Ranks()
        self.disk_ranks = disks.ranks_with(self.ranks.rank)  # that share this rank's disk, ascending

    def __str__(self) -> str:
        return str(self.disks)

    @property
    def is_leader(self) -> bool:
        """Whether this rank is the leader of its disk."""
        return self.ranks.rank == self.disk_ranks[0]

    def close(self) -> None:
        """Leave the process group of checkpoints. Safe to call again."""
        self.ranks.close()

    @abstractmethod
    def on_leaders(self, function: Callable[[], T]) -> T:
        """Each leader runs ``function``; every rank gets its leader's result, or the first exception of any leader."""

    @abstractmethod
    def gather_on_leaders(self, value: T) -> list[T]:
        """Every leader gets the values of all ranks, in the order of ranks; other ranks may get []."""

    # ---- looking

    @abstractmethod
    def newest_good(self, root: Path, *, verify: Verify, clear: Callable[[], Any]) -> tuple[str | None, list[Problem]]:
        """The newest checkpoint that is good on every disk, or None, and what is wrong with newer ones.

        Each leader calls ``clear`` first.
        """

    @abstractmethod
    def newest_entry(self, root: Path) -> Entry | None:
        """The newest checkpoint that is complete on any disk; hashes are not compared."""

    @abstractmethod
    def names_to_delete(self, inventory: Inventory, retire: RetirePolicy) -> list[str]:
        """What ``retire`` deletes of what each leader has in its ``inventory``, on leaders; [] on other ranks."""

    @abstractmethod
    def read_rng(self, checkpoint: Checkpoint) -> Any:
        """What this rank saved as its generators, from whichever disk has it; None if none has."""

    # ---- saving

    @abstractmethod
    def same_manifest(self, manifest: Manifest) -> Manifest:
        """The manifest that every leader writes."""

    @abstractmethod
    def state_on_leaders(self, state: Any) -> Any:
        """Rank 0's plain state on every leader; None elsewhere."""

    @abstractmethod
    def assign_replicas(self, shards: LocalShards, tensors: Mapping[str, Tensor]) -> None:
        """Set, in ``shards``, which of the ranks that hold the same shard writes it. Not a collective."""

    @abstractmethod
    def merge_indexes(self, indexes: Sequence[Index]) -> Index:
        """The index of the checkpoint from those of the ranks; on leaders, not a collective."""

    @abstractmethod
    def list_files(
        self, manifest: Manifest, written: Sequence[Mapping[str, FileRecord]], common: Mapping[str, FileRecord]
    ) -> None:
        """Fill in ``manifest.files`` and ``manifest.parts``; on leaders, not a collective.

        ``written`` has what each rank wrote, rank 0 first; where it is longer than the number of ranks, it has further
        rounds of all ranks. ``common`` are files that each leader writes.
        """

    @abstractmethod
    def markers(self) -> Iterable[tuple[str, bytes]]:
        """Small files to write on this rank's disk beside the manifest, by name; on leaders, not a collective."""
