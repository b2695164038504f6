"""What goes to which disk when the ranks of a save do not share one.

Every disk gets a part of the checkpoint under the same name: the files that its ranks wrote. Full tensors, replicas
of shards and rank 0's plain state are written once per disk, so that a part is all that its ranks need. Manifest and
index are the same bytes on every disk, and files of different ranks have different names: the directories of all disks
copied into one are the complete checkpoint. A small file, the marker, says which part a directory holds.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from mmtrain.checkpoint.format import tree
from mmtrain.checkpoint.format.manifest import DiskPart, FileRecord
from mmtrain.checkpoint.format.tensors import byte_view
from mmtrain.checkpoint.topology.base import Topology
from mmtrain.checkpoint.topology.disks import Disks
from mmtrain.errors import CheckpointError
from mmtrain.files import hash_bytes


def markers(disks: Disks) -> Iterator[tuple[str, list[int], bytes]]:
    """The marker of each part: its name, the ranks that write the part, the marker's bytes."""
    for number, ranks in enumerate(disks.groups()):
        yield f"part_{number:05d}.json", ranks, tree.to_json({"ranks": ranks})


def divide(
    written: Sequence[Mapping[str, FileRecord]], disks: Disks, common: Mapping[str, FileRecord]
) -> tuple[dict[str, FileRecord], list[DiskPart]]:
    """All files of a checkpoint, and which disk has which; arguments as in `Topology.list_files`.

    Raises CheckpointError if two disks have different files of one name: no directory could hold both parts.
    """
    files = dict(common)
    parts = []
    writer: dict[str, int] = {}
    for marker, ranks, data in markers(disks):
        files[marker] = FileRecord(len(data), hash_bytes(data))
        on_disk = {marker, *common}
        for number, records in enumerate(written):
            rank = number % len(disks.leaders)
            if rank not in ranks:
                continue
            for path, record in records.items():
                if files.setdefault(path, record) != record:
                    raise CheckpointError(
                        f"{path}: ranks {writer[path]} and {rank} wrote different files of this name to different "
                        "disks; put the rank into the names of files that differ"
                    )
                writer[path] = rank
                on_disk.add(path)
        parts.append(DiskPart(marker, tuple(ranks), tuple(sorted(on_disk))))
    return dict(sorted(files.items())), parts


def state_of_main(state: Any, topology: Topology) -> Any:
    """Rank 0's plain state on every leader; only tensors that differ on some disk are sent. A collective."""
    document = failure = None
    tensors: dict[str, Tensor] = {}
    hashes: dict[str, str] = {}
    if topology.is_leader:
        try:
            document, tensors = tree.split(state)
            hashes = {name: _hash(tensor) for name, tensor in tensors.items()}
        except Exception as error:
            failure = str(error) or repr(error)
    found = topology.ranks.gather((failure, hashes))
    for rank, (problem, _) in enumerate(found):
        if problem is not None:
            raise CheckpointError(f"rank {rank}: {problem}")
    main = found[0][1]
    leaders = set(topology.disks.leaders)
    differ = [name for name in main if any(found[rank][1].get(name) != main[name] for rank in leaders)]
    document, sent = topology.ranks.on_main(lambda: (document, {name: tensors[name] for name in differ}))
    return tree.join(document, tensors | sent) if topology.is_leader else None


def _hash(tensor: Tensor) -> str:
    return f"{tensor.dtype}{tuple(tensor.shape)}{hash_bytes(byte_view(tensor))}"
