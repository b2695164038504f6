"""The manifest: what a checkpoint is, which files it consists of, and the proof that they are complete.

``manifest.json`` is written last, so a directory without one is not a checkpoint. It lists every other file with
its size and its xxh3-128 hash (https://xxhash.com), and has a hash of itself. The format is specified in
``docs/checkpoint_format.md``; this is its version 1. Nothing here touches a disk.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from typing import Any

from mmtrain.checkpoint.format import check
from mmtrain.errors import CheckpointError
from mmtrain.files import hash_bytes

FORMAT = 1
MANIFEST = "manifest.json"
MANIFEST_LIMIT = 64 << 20  # bytes; with ten thousand files it is about one MB
_BLANK = "0" * 32

_FIELDS = {
    "position": check.OBJECT,
    "world_size": check.PROCESSES,
    "strategy": check.TEXT,
    "seed": check.WHOLE.or_none(),
    "config": check.TEXT,
    "data_fingerprint": check.TEXT,
    "versions": check.OBJECT,
    "temporary": check.FLAG,
    "sections": check.TEXTS,
    "meta": check.OBJECT,
    "parts": check.LIST,
    "created": check.TEXT,
}
_RECORD = {"size": check.SIZE, "xxh3_128": check.HASH}
_PART = {"marker": check.TEXT, "ranks": check.COUNTS, "files": check.TEXTS}
# The names in ``meta`` that mmtrain gives a meaning; a user of the store alone may add any others.
_META = {
    "batch_size": check.POSITIVE.or_none(),
    "data_size": check.POSITIVE,
    "accumulative_counts": check.POSITIVE,
    "samples_per_epoch": check.COUNT.or_none(),
    "iterations_per_epoch": check.COUNT.or_none(),
    "max_iters": check.COUNT.or_none(),
    "max_epochs": check.COUNT.or_none(),
    "optimizer": check.TEXT,
    "experiment_name": check.TEXT,
    "timestamp": check.TEXT,
    "config_values": check.OBJECT,
    "has_optimizer": check.FLAG,
    "has_frozen": check.FLAG,
    "generation": check.COUNT,
    "since": check.COUNT,
    "began": check.TEXT,
    "run": check.TEXT,
    "frozen": check.OBJECT,
    "native": check.OBJECT.or_none(),
}
_FROZEN = {"types": check.TEXTS, "hash": check.TEXT}
_NATIVE = {
    "version": check.TEXT,
    "stage": check.COUNT,
    "world": check.PROCESSES,
    "dtype": check.TEXT,
    "layout": check.TEXT,
    "frozen": check.FLAG,
}


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
    def run(self) -> str:
        """The run that saved it, drawn at a fresh start and kept over resumes in the same directory; "" if unknown."""
        return str(self.meta.get("run") or self.meta.get("began", ""))

    @property
    def epoch(self) -> int:
        """Epochs that were complete when it was saved."""
        return int(self.position.get("epoch", 0))

    @property
    def bytes(self) -> int:
        """Size of all files together, without the manifest."""
        return sum(record.size for record in self.files.values())


def encode(manifest: Manifest) -> bytes:
    """Return the file's bytes. Raises CheckpointError if a field is not a JSON value of the format's type."""
    document = {"format": manifest.format, **asdict(manifest), "checksum": _BLANK}
    if not manifest.parts:
        del document["parts"]
    where = f"the manifest of {manifest.name}"
    try:
        text = json.dumps(document, indent=1, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} cannot be written as JSON: {error}") from error
    head, _, tail = text.rpartition(_BLANK)
    data = (head + hash_bytes(text.encode()) + tail).encode()
    if len(data) > MANIFEST_LIMIT:
        raise CheckpointError(f"{where} has {len(data)} bytes, but a reader takes {MANIFEST_LIMIT} at most")
    _check(json.loads(text), where)
    return data


def decode(data: bytes, where: str = MANIFEST) -> Manifest:
    """Read what `encode` gave. Raises CheckpointError, naming ``where``, unless every byte is as written."""
    document = check.parse(data, where)
    if not isinstance(document, dict) or not isinstance(document.get("checksum"), str):
        raise CheckpointError(f"{where}: not a manifest of an mmtrain checkpoint (it has no checksum)")
    if document.get("format") != FORMAT:
        found = document.get("format")
        raise CheckpointError(f"{where}: format {found!r}, but this version of mmtrain reads format {FORMAT}")
    checksum = document.pop("checksum").encode("utf-8", "replace")
    head, _, tail = data.rpartition(checksum or b"?")
    if hash_bytes(head + _BLANK.encode() + tail).encode() != checksum:
        raise CheckpointError(f"{where}: its checksum does not match its contents; the file was changed or damaged")
    _check(document, where)
    return _build(document)


def _check(document: Mapping[str, Any], where: str) -> None:
    """Check the type of every field, and that all files are inside the checkpoint."""
    try:
        check.fields(document, {"files": check.OBJECT, "name": check.TEXT}, "manifest", required=True)
        check.fields(document, _FIELDS, "manifest")
        check.values(document.get("position", {}), check.COUNT, "position")
        check.values(document.get("versions", {}), check.TEXT, "versions")
        _check_meta(document.get("meta", {}))
        for path, record in document["files"].items():
            check.fields(record, _RECORD, f"files.{path}", required=True)
        for number, part in enumerate(document.get("parts", ())):
            check.fields(part, _PART, f"parts[{number}]", required=True)
            unlisted = {part["marker"], *part["files"]} - document["files"].keys()
            if unlisted:
                raise ValueError(f"parts[{number}] names {min(unlisted)!r}, which is not in files")
    except ValueError as error:
        raise CheckpointError(f"{where}: a field of format {FORMAT} is missing or malformed ({error})") from error
    for path in document["files"]:
        check.inside(path, where)


def _check_meta(meta: Mapping[str, Any]) -> None:
    check.fields(meta, _META, "meta")
    check.values(meta.get("config_values", {}), check.TEXT, "meta.config_values")
    if meta.get("native") is not None:
        check.fields(meta["native"], _NATIVE, "meta.native")
    if meta.get("frozen"):
        check.fields(meta["frozen"], _FROZEN, "meta.frozen", required=True)


def _build(document: Mapping[str, Any]) -> Manifest:
    known = {f.name for f in fields(Manifest)}
    values = {key: value for key, value in document.items() if key in known}
    values["files"] = {path: FileRecord(one["size"], one["xxh3_128"]) for path, one in document["files"].items()}
    values["parts"] = [
        DiskPart(part["marker"], tuple(part["ranks"]), tuple(part["files"])) for part in document.get("parts", ())
    ]
    return Manifest(**values)
