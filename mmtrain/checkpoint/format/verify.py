"""Whether a checkpoint on disk is, byte for byte, what was written."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mmtrain.checkpoint.format.manifest import MANIFEST, MANIFEST_LIMIT, DiskPart, FileRecord, Manifest, decode
from mmtrain.checkpoint.format.structure import find_fault
from mmtrain.errors import CheckpointError
from mmtrain.files import check_regular, hash_file, read_bounded
from mmtrain.printable import printable

Verify = Literal["full", "size", "none"]


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault of one checkpoint: which file, and what is wrong with it. ``str()`` is one line."""

    checkpoint: str
    file: str
    fault: str

    def __str__(self) -> str:
        return printable(f"{self.checkpoint}/{self.file}: {self.fault}").replace("\n", "\\n")


def read_manifest(directory: Path) -> Manifest:
    """Read and check the manifest of the checkpoint in ``directory``. Raises CheckpointError with a one-line reason."""
    try:
        data = read_bounded(directory / MANIFEST, MANIFEST_LIMIT)
    except FileNotFoundError as error:
        raise CheckpointError(f"{directory / MANIFEST}: missing; this is not a complete checkpoint") from error
    except OSError as error:
        raise CheckpointError(f"{directory / MANIFEST}: cannot be read ({error})") from error
    return decode(data, str(directory / MANIFEST))


def find_problems(directory: Path, manifest: Manifest, *, verify: Verify = "full") -> list[Problem]:
    """Compare every file with the manifest: there, of the right size and, with ``verify='full'``, of the right hash.

    Where all hashes are right, ``verify='full'`` also reads the index and the plain states: they must be what a save
    writes. Files that the manifest does not list, and parts on other disks, are ignored. ``verify='none'`` compares
    nothing.
    """
    problems: list[Problem] = []
    here = files_here(directory, manifest) if verify != "none" else []
    for path in here:
        fault = _fault(directory / path, manifest.files[path], hashes=verify == "full")
        if fault:
            problems.append(Problem(directory.name, path, fault))
    if verify == "full" and not problems:
        found = find_fault(directory, manifest, here)
        if found is not None:
            problems.append(Problem(directory.name, *found))
    return problems


def parts_here(directory: Path, manifest: Manifest) -> list[DiskPart]:
    """The parts in this directory: that of one disk, or several that were copied together."""
    return [part for part in manifest.parts if (directory / part.marker).exists()]


def files_here(directory: Path, manifest: Manifest) -> list[str]:
    """The files that must be in this directory: all, or those of `parts_here`; all again where that has none."""
    parts = parts_here(directory, manifest)
    if not parts:
        return list(manifest.files)
    wanted = {path for part in parts for path in part.files}
    return [path for path in manifest.files if path in wanted]


def _fault(path: Path, record: FileRecord, *, hashes: bool) -> str:
    try:
        status = path.stat()
        check_regular(status, path)
        size = status.st_size
        if size != record.size:
            return f"{size} bytes instead of {record.size}"
        if hashes and hash_file(path) != record.xxh3_128:
            return "its contents are not what was written (the xxh3-128 hash differs)"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read ({error})"
    return ""
