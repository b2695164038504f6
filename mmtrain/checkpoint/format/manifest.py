"""The manifest: what a checkpoint is, which files it consists of, and the proof that they are complete.

``manifest.json`` is written last, so a directory without one is not a checkpoint. It lists every other file with
its size and its xxh3-128 hash (https://xxhash.com), and has a hash of itself. The format is specified in
``docs/checkpoint_format.md``; this is its version 1. Nothing here touches a disk.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import PurePosixPath
from typing import Any

from mmtrain.errors import CheckpointError
from mmtrain.files import hash_bytes

FORMAT = 1
MANIFEST = "manifest.json"
_BLANK = "0" * 32


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of a checkpoint: its size in bytes and its xxh3-128 hash in lower-case hexadecimal."""

    size: int
    xxh3_128: str


@dataclass(frozen=True, slots=True)
class DiskPart:
    """What one disk holds of a checkpoint whose ranks do not share one: the ranks that wrote there, and its files.

    ``marker`` is one of the files: a directory that contains it holds this part. A file may be in several parts.
    """

    marker: str
    ranks: tuple[int, ...]
    files: tuple[str, ...]


@dataclass(slots=True, kw_only=True)
class Manifest:
    """What `CheckpointStore.save` was given, and the files that hold the state.

    ``position`` is `mmtrain.progress.Progress` as a dict; ``config`` the text of the run's config; ``temporary`` marks
    a checkpoint that retention may delete as soon as there is a newer one; ``meta`` takes any further JSON values.
    ``files`` is keyed by the path inside the checkpoint, with forward slashes. ``parts`` is empty unless the ranks
    wrote to different disks: each disk then holds this same manifest and the files of its part.
    """

    name: str
    files: dict[str, FileRecord] = field(default_factory=dict)
    position: dict[str, int] = field(default_factory=dict)
    world_size: int = 1
    strategy: str = ""
    seed: int | None = None
    config: str = ""
    data_fingerprint: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    temporary: bool = False
    sections: list[str] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)
    parts: list[DiskPart] = field(default_factory=list)
    created: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="microseconds"))
    format: int = FORMAT

    @property
    def iteration(self) -> int:
        """Iterations done when it was saved."""
        return int(self.position.get("iteration", 0))

    @property
    def has_frozen(self) -> bool:
        """Whether frozen parameters are in it; ``save_frozen=False`` or the engine may leave them out."""
        return bool(self.meta.get("has_frozen", True) and (self.meta.get("native") or {}).get("frozen", True))

    @property
    def generation(self) -> int:
        """The generation of the run that saved it, from 0.

        A start that does not continue from the newest checkpoint in its work dir (a fresh one, one from an older
        checkpoint, one whose larger batch counts fewer iterations) begins the next generation. Checkpoints of a later
        generation count as newer at any iteration.
        """
        return int(self.meta.get("generation", 0))

    @property
    def epoch(self) -> int:
        """Epochs that were complete when it was saved."""
        return int(self.position.get("epoch", 0))

    @property
    def bytes(self) -> int:
        """Size of all files together, without the manifest."""
        return sum(record.size for record in self.files.values())


def encode(manifest: Manifest) -> bytes:
    """Return the file's bytes. Raises CheckpointError if a field is not a JSON value."""
    document = {"format": manifest.format, **asdict(manifest), "checksum": _BLANK}
    if not manifest.parts:
        del document["parts"]
    try:
        text = json.dumps(document, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the manifest of {manifest.name} cannot be written as JSON: {error}") from error
    head, _, tail = text.rpartition(_BLANK)
    return (head + hash_bytes(text.encode()) + tail).encode()


def decode(data: bytes, where: str = MANIFEST) -> Manifest:
    """Read what `encode` gave. Raises CheckpointError, naming ``where``, unless every byte is as written."""
    try:
        document = json.loads(data.decode("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(document, dict) or not isinstance(document.get("checksum"), str):
        raise CheckpointError(f"{where}: not a manifest of an mmtrain checkpoint (it has no checksum)")
    if document.get("format") != FORMAT:
        found = document.get("format")
        raise CheckpointError(f"{where}: format {found!r}, but this version of mmtrain reads format {FORMAT}")
    checksum = document.pop("checksum").encode()
    head, _, tail = data.rpartition(checksum or b"?")
    if hash_bytes(head + _BLANK.encode() + tail).encode() != checksum:
        raise CheckpointError(f"{where}: its checksum does not match its contents; the file was changed or damaged")
    return _build(document, where)


def _build(document: Mapping[str, Any], where: str) -> Manifest:
    known = {f.name for f in fields(Manifest)}
    try:
        values = {key: value for key, value in document.items() if key in known}
        values["files"] = {path: FileRecord(**record) for path, record in document["files"].items()}
        parts = [DiskPart(p["marker"], tuple(p["ranks"]), tuple(p["files"])) for p in document.get("parts", [])]
        manifest = Manifest(**{**values, "parts": parts})
        unlisted = {path for part in parts for path in (part.marker, *part.files)} - manifest.files.keys()
        if unlisted:
            raise KeyError(min(unlisted))
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where}: a field of format {FORMAT} is missing or malformed ({error})") from error
    for path in manifest.files:
        check_inside(path, where)
    return manifest


def check_inside(path: str, where: str) -> None:
    """Refuse a file name that leads out of the checkpoint's directory."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts:
        raise CheckpointError(f"{where}: it lists {path!r}, which is not inside the checkpoint")
