"""Whether the files of a checkpoint fit together: what hashes cannot say of files that were written wrong."""

from collections.abc import Collection, Mapping
from math import prod
from pathlib import Path

from mmtrain.checkpoint.format import check, tree
from mmtrain.checkpoint.format.index import INDEX, Index, decode_index, entries_of
from mmtrain.checkpoint.format.manifest import FileRecord, Manifest
from mmtrain.checkpoint.format.tensors import DTYPES
from mmtrain.errors import CheckpointError
from mmtrain.files import read_bounded


def read_file(path: Path) -> bytes:
    """Read a JSON file of a checkpoint. Raises CheckpointError where it cannot be read, or is too large for one."""
    try:
        return read_bounded(path, check.JSON_LIMIT)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error


def read_index(directory: Path, manifest: Manifest) -> Index:
    """Read ``tensors.json``. Raises CheckpointError where it is malformed or does not fit the files of the manifest."""
    path = directory / INDEX
    index = decode_index(read_file(path), str(path))
    fault = _misfit(index, manifest.files)
    if fault:
        raise CheckpointError(f"{path}: {fault}")
    return index


def find_fault(directory: Path, manifest: Manifest, here: Collection[str]) -> tuple[str, str] | None:
    """The first file of those ``here`` that cannot be what a save wrote, and its fault."""
    try:
        index = read_index(directory, manifest)
    except CheckpointError as error:
        return INDEX, str(error).removeprefix(f"{directory / INDEX}: ")
    for path in here:
        if path == "state.json" or (path.startswith("rng/") and path.endswith(".json")):
            try:
                document = check.parse(read_file(directory / path), str(directory / path))
                tensors = index.get(path.removesuffix(".json"), {})
                tree.check(document, {name: entry.shape for name, entry in tensors.items()})
            except CheckpointError as error:
                return path, str(error).removeprefix(f"{directory / path}: ")
    return None


def _misfit(index: Index, files: Mapping[str, FileRecord]) -> str:
    """What in ``index`` names a file that is not listed, or bytes that it does not have; "" where all fits."""
    for entry in entries_of(index):
        width = DTYPES[entry.dtype].itemsize if entry.dtype in DTYPES else 0
        for shard in entry.shards:
            size = prod(shard.shape) * width
            for place in shard.locations():
                if place.file not in files:
                    return f"it names {place.file}, which is not in the manifest"
                if size and place.start + size > files[place.file].size:
                    return f"it names byte {place.start + size} of {place.file}, which has {files[place.file].size}"
    return ""
