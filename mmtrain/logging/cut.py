"""Cuts logs at a position, so that the curves of a resumed run have no point twice."""

import json
import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mmtrain.files import replacing
from mmtrain.logging.starts import LogPosition, read_start


def cut_logs(log_dirs: Sequence[str | Path], position: LogPosition) -> dict[Path, int]:
    """Cut the scalar and TensorBoard files in ``<log_dir>/vis_data`` of each directory after ``position``.

    The directories are in the order of their starts. Files are replaced atomically, and only when something is dropped.
    Returns the files changed and the records dropped from each.
    """
    dropped: dict[Path, int] = {}
    counts_alike = True  # from that start to the position no other batch size came between
    for log_dir in reversed(log_dirs):
        noted = read_start(Path(log_dir))
        start = None if noted is None else noted.position
        if start is not None and 0 < start.samples <= position.samples:
            counts_alike = counts_alike and start.counts_like(position)
        step = _last_step(start, position, counts_alike=counts_alike)
        for path in sorted((Path(log_dir) / "vis_data").glob("*")):
            if path.name == "scalars.json":
                dropped[path] = cut_json_lines(path, step)
            elif path.name.startswith("events.out.tfevents"):
                dropped[path] = cut_events(path, step)
    return {path: count for path, count in dropped.items() if count}


def _last_step(start: LogPosition | None, position: LogPosition, *, counts_alike: bool) -> float:
    """The last step to keep of a start's logs.

    Where another batch size came between, the start was cut to the step when that one began. So the estimate from
    samples only decides over logs that do not lead to the position, and must never be too small for those that do.
    """
    if start is None:
        return position.iteration
    if position.samples < start.samples:
        return 0  # everything is dropped, except the header of an event file
    if counts_alike and start.counts_like(position):
        return position.iteration
    ahead = position.samples - start.samples
    if ahead and not start.mean_batch:
        return math.inf
    return start.iteration + math.ceil(ahead / (start.mean_batch or 1))


def cut_json_lines(path: str | Path, step: float) -> int:
    """Drop the lines at the end whose ``step`` is larger, and an incomplete last one; returns how many.

    Steps only grow within a file, so only what is dropped is parsed: a long run's log costs no more than a short one's.
    A missing file is not an error.
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


def cut_events(path: str | Path, step: float) -> int:
    """Drop the records of a TensorBoard event file with a larger step, and an incomplete last one; returns how many."""
    path = Path(path)
    data = path.read_bytes()
    records = list(_records(data))
    kept = [record for record in records if _event_step(record[12:-4]) <= step]
    torn = sum(map(len, records)) < len(data)
    if len(kept) < len(records) or torn:
        _replace(path, kept)
    return len(records) - len(kept) + torn


def _replace(path: Path, parts: Iterable[bytes]) -> None:
    with replacing(path, durable=False) as aside:  # not worth waiting for the disk: it is only a log
        aside.write_bytes(b"".join(parts))


def _line_step(line: bytes) -> float:
    try:
        found = json.loads(line)
    except ValueError:
        return -1  # not a line of this format: keep it
    value = found.get("step", -1) if isinstance(found, dict) else -1
    return value if isinstance(value, (int, float)) else -1


def _records(data: bytes) -> Iterator[bytes]:
    """Complete TFRecords: length (8 bytes), its CRC (4), the payload, its CRC (4)."""
    start = 0
    while start + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        end = start + 16 + length
        if end > len(data):
            return
        yield data[start:end]
        start = end


def _event_step(event: bytes) -> int:
    """Field 2 (a varint) of tensorboard's Event message; 0 if it is absent, as protobuf leaves out zeros."""
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
