"""Cuts the end of a log file: read in blocks from the end, so a long run's log costs no more than a short one's."""

import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from mmtrain.files import UnusableFileError, open_private, open_regular, replacing

_BLOCK = 1 << 20
_LONGEST_LINE = 64 << 20  # bytes; a file with a longer one is not of this format and is left alone
_HEADER = 12  # of a TFRecord: the length of its payload (8 bytes), the CRC of that (4); the payload and its CRC follow
_PREFIX = 64  # bytes of a payload in which the step is: it comes after the time, before all that can be long


def cut_json_lines(path: str | Path, step: float) -> int:
    """Drop the lines at the end whose ``step`` is larger, and an incomplete last one; returns how many.

    Steps only grow within a file, so only what is dropped is read. What is not a file, or missing, is not an error.
    """
    with _opened(path) as (handle, size):
        keep, dropped = size, 0
        for start, line in _lines_from_end(handle, size):
            is_torn = start + len(line) == size
            if not is_torn and _line_step(line) <= step:
                break
            keep = start
            dropped += bool(line) or not is_torn
    return _shorten(Path(path), keep, [], dropped)


def cut_events(path: str | Path, step: float) -> int:
    """Drop the records of a TensorBoard event file with a larger step, and an incomplete last one; returns how many.

    Reading ends at the first block without a record to drop: a value that was logged with a step of its own, among the
    others, does not end it. What is not a file, or has no records, is left alone.
    """
    keep, rest, dropped = 0, [], 0
    with _opened(path) as (handle, size):
        keep = size
        passed: list[tuple[int, int]] = []
        for records in _records_from_end(handle, size):
            found = len(passed), dropped
            for start, end in records:
                is_torn = end > size
                if is_torn or _event_step(os.pread(handle, _PREFIX, start + _HEADER)) > step:
                    keep, dropped = start, dropped + 1
                else:
                    passed.append((start, end))
            if dropped == found[1] and len(passed) > found[0]:
                break
        rest = [os.pread(handle, end - start, start) for start, end in reversed(passed) if start > keep]
    return _shorten(Path(path), keep, rest, dropped)


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[int, int]]:
    """Handle and size of a file; an empty one in place of what is missing, or is a pipe or a device."""
    try:
        handle = open_regular(Path(path))
    except (FileNotFoundError, UnusableFileError):
        yield -1, 0
        return
    try:
        yield handle, os.fstat(handle).st_size
    finally:
        os.close(handle)


def _shorten(path: Path, keep: int, rest: list[bytes], dropped: int) -> int:
    """Leave the first ``keep`` bytes, and ``rest`` after them; returns ``dropped``, and does nothing if that is 0.

    A file of our own is truncated, which needs no room on a full disk. One that has another name, or is a link, is
    replaced: what it leads to belongs to someone else.
    """
    if not dropped:
        return 0
    if not rest:
        try:
            handle = open_private(path)
        except OSError:
            pass
        else:
            os.ftruncate(handle, keep)
            os.close(handle)
            return dropped
    with replacing(path, durable=False) as aside, path.open("rb") as old, aside.open("xb") as new:  # only a log
        while keep and (block := old.read(min(_BLOCK, keep))):
            new.write(block)
            keep -= len(block)
        new.writelines(rest)
    return dropped


# ---- JSON lines -------------------------------------------------------------------------------------------------
def _lines_from_end(handle: int, size: int) -> Iterator[tuple[int, bytes]]:
    """Start and text of each line, last first; the first of all is what follows the last line feed, maybe nothing."""
    position, unfinished = size, b""
    while position:
        length = min(max(_BLOCK, len(unfinished)), position)  # growing: a long line is not copied again and again
        position -= length
        *_, unfinished = pieces = (os.pread(handle, length, position) + unfinished).split(b"\n")
        end = position + sum(map(len, pieces)) + len(pieces) - 1
        for piece in reversed(pieces[1:]):
            yield end - len(piece), piece
            end -= len(piece) + 1
        unfinished = pieces[0]
        if len(unfinished) > _LONGEST_LINE:
            return
    if size:
        yield 0, unfinished


def _line_step(line: bytes) -> float:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return -1  # not a line of this format: keep it
    value = found.get("step", -1) if isinstance(found, dict) else -1
    return value if isinstance(value, (int, float)) else -1


# ---- TensorBoard events -----------------------------------------------------------------------------------------
def _records_from_end(handle: int, size: int) -> Iterator[list[tuple[int, int]]]:
    """Start and end of the TFRecords of each block, last first. The end of an incomplete one is beyond ``size``.

    A record's length is in front of it, so backwards it is found by the checksum of its length, and believed if it ends
    where the next one starts.
    """
    top, following = size, -1
    while top:
        low = max(0, top - _BLOCK)
        data = os.pread(handle, top - low + _HEADER - 1, low)
        found = []
        for offset, length in reversed(_headers(data)):
            start, end = low + offset, low + offset + 16 + length
            if following < 0 and end < size:  # what follows the last complete record is too short for a header
                found.append((end, size + 1))
                following = end
            if following in (-1, end):
                found.append((start, end))
                following = start
        yield found
        top = low


def _headers(data: bytes) -> list[tuple[int, int]]:
    """Where headers of TFRecords may start in ``data``, and the lengths that they give; by their checksums."""
    raw = np.frombuffer(data, np.uint8)
    count = len(raw) - _HEADER + 1
    if count < 1:
        return []
    short = raw[4 : 4 + count] == 0  # a payload below 4 GB: three comparisons leave little to compute
    for place in (5, 6, 7):
        short &= raw[place : place + count] == 0
    places = np.flatnonzero(short)
    crc = np.full(len(places), 0xFFFFFFFF, np.uint32)
    for place in range(8):
        crc = _CRC_TABLE[(crc ^ raw[places + place]) & 0xFF] ^ (crc >> 8)
    crc = ~crc
    masked = ((crc >> 15) | (crc << 17)) + np.uint32(0xA282EAD8)  # as TFRecord stores it
    stored = sum(raw[places + 8 + place].astype(np.uint32) << (8 * place) for place in range(4))
    found = places[masked == stored]
    return [(int(place), struct.unpack_from("<Q", data, place)[0]) for place in found]


def _crc_table() -> np.ndarray:
    """The table of CRC-32C (Castagnoli, RFC 3720) for one byte."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0x82F63B78), table >> 1)
    return table


_CRC_TABLE = _crc_table()


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
