"""What goes to which disk when the ranks of a save do not share one.

Every disk gets a part of the checkpoint under the same name: the files that its own ranks wrote. Whole tensors,
replicas of shards and rank 0's plain state are written once a disk, so that a part is all that its ranks need. Manifest
and index are the same bytes on every disk, and files of different ranks have different names: the directories of all
disks copied into one are the whole checkpoint. A small file, the marker, says which part a directory holds.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from mmtrain.checkpoint.format import tree
from mmtrain.checkpoint.format.manifest import DiskPart, FileRecord
from mmtrain.checkpoint.format.tensors import byte_view
from mmtrain.checkpoint.sharding import Held
from mmtrain.checkpoint.topology.disks import Disks
from mmtrain.checkpoint.topology.ranks import Ranks
from mmtrain.dtensor import is_dtensor, ranks_with_same_shard
from mmtrain.errors import CheckpointError
from mmtrain.files import hash_bytes


def markers(disks: Disks) -> Iterator[tuple[str, list[int], bytes]]:
    """The marker of each part: its name, the ranks that write the part, the marker's bytes."""
    for number, ranks in enumerate(disks.all()):
        yield f"part_{number:05d}.json", ranks, tree.to_json({"ranks": ranks})


def divide(
    written: Sequence[Mapping[str, FileRecord]], disks: Disks, common: Mapping[str, FileRecord]
) -> tuple[dict[str, FileRecord], list[DiskPart]]:
    """All files of a checkpoint, and how they lie on the disks: ``written`` holds what each rank wrote, rank 0 first.

    Where there are more than ranks they are further rounds of all ranks. ``common`` lies on every disk. Raises
    CheckpointError where two disks have different files of one name: no directory could hold both parts.
    """
    files, parts = dict(common), []
    writer: dict[str, int] = {}
    for marker, ranks, data in markers(disks):
        files[marker] = FileRecord(len(data), hash_bytes(data))
        own = {marker, *common}
        for number, records in enumerate(written):
            rank = number % len(disks.leaders)
            if rank not in ranks:
                continue
            for path, record in records.items():
                if files.setdefault(path, record) != record:
                    raise CheckpointError(
                        f"{path}: ranks {writer[path]} and {rank} wrote different files of this name to disks of their "
                        "own; give files that differ the rank in their name"
                    )
                writer[path] = rank
                own.add(path)
        parts.append(DiskPart(marker, tuple(ranks), tuple(sorted(own))))
    return dict(sorted(files.items())), parts


def write_replicas_here(held: Held, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Let the lowest rank of this disk that holds a replicated shard write it, in place of the lowest of all."""
    for number, piece in enumerate(held.pieces):
        if piece.name in held.aliases or not is_dtensor(tensors[piece.name]):
            continue
        same_box = ranks_with_same_shard(tensors[piece.name])
        if same_box:
            held.writes[number] = ranks.rank == min(set(same_box) & set(ranks.own))


def state_of_main(state: Any, ranks: Ranks) -> Any:
    """Rank 0's plain state on every leader; of its tensors only those travel that differ somewhere. A collective."""
    document, failure = None, None
    tensors: dict[str, Tensor] = {}
    digests: dict[str, str] = {}
    if ranks.leader:
        try:
            document, tensors = tree.split(state)
            digests = {name: _digest(tensor) for name, tensor in tensors.items()}
        except Exception as error:
            failure = str(error) or repr(error)
    said = ranks.gather((failure, digests))
    for rank, (trouble, _) in enumerate(said):
        if trouble is not None:
            raise CheckpointError(f"rank {rank}: {trouble}")
    main = said[0][1]
    leaders = set(ranks.disks.leaders)
    differ = [name for name in main if any(said[rank][1].get(name) != main[name] for rank in leaders)]
    document, sent = ranks.on_main(lambda: (document, {name: tensors[name] for name in differ}))
    return tree.join(document, tensors | sent) if ranks.leader else None


def _digest(tensor: Tensor) -> str:
    return f"{tensor.dtype}{tuple(tensor.shape)}{hash_bytes(byte_view(tensor))}"
