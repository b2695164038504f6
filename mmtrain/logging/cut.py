"""Cuts what lies past a step out of logs, so that a resumed run's curves hold no point twice."""

import json
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path


def cut_logs(log_dirs: Iterable[str | Path], step: int) -> dict[Path, int]:
    """Cut the scalar and TensorBoard files in ``<log_dir>/vis_data`` of each directory after ``step``.

    Files are replaced atomically, and only when something goes. Returns the files changed and the records dropped from
    each.
    """
    dropped: dict[Path, int] = {}
    for log_dir in log_dirs:
        for path in sorted((Path(log_dir) / "vis_data").glob("*")):
            if path.name == "scalars.json":
                dropped[path] = cut_json_lines(path, step)
            elif path.name.startswith("events.out.tfevents"):
                dropped[path] = cut_events(path, step)
    return {path: count for path, count in dropped.items() if count}


def cut_json_lines(path: str | Path, step: int) -> int:
    """Drop the lines at the end whose ``step`` is larger, and a torn last one; returns how many.

    Steps only grow within a file, so only what is dropped is parsed: a long run's log costs no more than a short one's.
    A missing file is no fault.
    """
    path = Path(path)
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    kept = len(lines)
    while kept and not (lines[kept - 1].endswith(b"\n") and _line_step(lines[kept - 1]) <= step):
        kept -= 1
    if kept < len(lines):
        _replace(path, lines[:kept])
    return len(lines) - kept


def cut_events(path: str | Path, step: int) -> int:
    """Drop the records of a TensorBoard event file whose step is larger, and a torn last one; returns how many."""
    path = Path(path)
    data = path.read_bytes()
    records = list(_records(data))
    kept = [record for record in records if _event_step(record[12:-4]) <= step]
    torn = sum(map(len, records)) < len(data)
    if len(kept) < len(records) or torn:
        _replace(path, kept)
    return len(records) - len(kept) + torn


def _replace(path: Path, parts: Iterable[bytes]) -> None:
    aside = path.with_name(f".{path.name}.cut")
    aside.write_bytes(b"".join(parts))
    aside.replace(path)


def _line_step(line: bytes) -> float:
    try:
        found = json.loads(line)
    except ValueError:
        return -1  # not a line of ours: leave it
    value = found.get("step", -1) if isinstance(found, dict) else -1
    return value if isinstance(value, (int, float)) else -1


def _records(data: bytes) -> Iterator[bytes]:
    """Whole TFRecords: length (8 bytes), its CRC (4), the payload, its CRC (4)."""
    start = 0
    while start + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        end = start + 16 + length
        if end > len(data):
            return
        yield data[start:end]
        start = end


def _event_step(event: bytes) -> int:
    """Field 2 (a varint) of tensorboard's Event message; 0 where it is absent, as protobuf leaves out zeros."""
    position = 0
    while position < len(event):
        key, position = _varint(event, position)
        field, wire = key >> 3, key & 7
        if wire == 0:
            value, position = _varint(event, position)
            if field == 2:
                return value
        elif wire == 1:
            position += 8
        elif wire == 2:
            length, position = _varint(event, position)
            position += length
        elif wire == 5:
            position += 4
        else:
            return 0
    return 0


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(data):
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            break
    return value, position
