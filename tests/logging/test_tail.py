"""Files are cut at the right place whatever the size of blocks, reading no more than their ends."""

import json
import os
import random
import struct

import pytest

from mmtrain.logging import LogPosition, cut_events, cut_json_lines, cut_logs, tail


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def varint(value):
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(data) + bytes([value])


def record(step, *, size=10):
    """A TFRecord with an Event: time, step, and a summary of ``size`` bytes."""
    payload = b"\x09" + struct.pack("<d", 1.5) + (b"\x10" + varint(step) if step else b"") + b"\x2a" + varint(size)
    payload += bytes(random.Random(step).randbytes(size))
    length = struct.pack("<Q", len(payload))
    return length + struct.pack("<I", crc32c(length)) + payload + bytes(4)


def line(step, *, size=10):
    return json.dumps({"mode": "train", "step": step, "x": "y" * size}).encode() + b"\n"


@pytest.fixture
def read(monkeypatch):
    """How many bytes were read."""
    amounts = []
    pread = os.pread

    def counted(handle, count, position):
        data = pread(handle, count, position)
        amounts.append(len(data))
        return data

    monkeypatch.setattr(os, "pread", counted)
    return amounts


@pytest.mark.parametrize("block", [16, 50, 333, 1 << 20])
@pytest.mark.parametrize("seed", range(8))
def test_every_cut_is_that_of_a_reader_from_the_start(tmp_path, monkeypatch, block, seed):
    monkeypatch.setattr(tail, "_BLOCK", block)
    generator = random.Random(seed)
    steps = sorted(generator.randrange(300) for _ in range(generator.randrange(1, 30)))
    for kind, make, cut in (("scalars.json", line, cut_json_lines), ("events.out.tfevents.1", record, cut_events)):
        parts = [make(step, size=generator.choice((0, 3, 40, 700))) for step in steps]
        torn = make(999)[: generator.randrange(len(make(999)))]
        for last in (0, steps[0], generator.choice(steps), steps[-1], 1000):
            path = tmp_path / kind
            path.write_bytes(b"".join(parts) + torn)
            kept = [part for part, step in zip(parts, steps, strict=True) if step <= last]
            assert cut(path, last) == len(parts) - len(kept) + bool(torn), (kind, last)
            assert path.read_bytes() == b"".join(kept), (kind, last)


def test_values_with_a_step_of_their_own_stay(tmp_path):
    steps = [0, 1, 2, 0, 3, 0, 4, 1]
    path = tmp_path / "events.out.tfevents.1"
    path.write_bytes(b"".join(map(record, steps)))
    assert cut_events(path, 2) == 2
    assert path.read_bytes() == b"".join(map(record, [0, 1, 2, 0, 0, 1]))


@pytest.mark.parametrize(("name", "make", "cut"), [("s", line, cut_json_lines), ("e", record, cut_events)])
def test_only_the_end_of_a_large_file_is_read(tmp_path, read, name, make, cut):
    path = tmp_path / name
    block = b"".join(make(step % 1000 + 1, size=1000) for step in range(1000))
    path.write_bytes(block * 60 + b"".join(map(make, range(1001, 1101))))
    before = path.stat()
    assert before.st_size > 60_000_000
    assert cut(path, 1050) == 50
    assert path.stat().st_size == before.st_size - sum(len(make(step)) for step in range(1051, 1101))
    assert path.stat().st_ino == before.st_ino
    assert sum(read) < 3 << 20


@pytest.mark.parametrize(("name", "make"), [("scalars.json", line), ("events.out.tfevents.1", record)])
@pytest.mark.parametrize("kind", ["symlink_to", "hardlink_to"])
def test_a_file_of_someone_else_is_not_cut(tmp_path, name, make, kind):
    """A backup with hard links, and a link: what they lead to keeps its contents."""
    log = tmp_path / "run" / "vis_data"
    log.mkdir(parents=True)
    whole = b"".join(map(make, range(1, 9)))
    (tmp_path / "other").write_bytes(whole)
    getattr(log / name, kind)(tmp_path / "other")
    assert cut_logs([log.parent], LogPosition(3, 3)) == {log / name: 5}
    assert (log / name).read_bytes() == b"".join(map(make, range(1, 4)))
    assert (tmp_path / "other").read_bytes() == whole


def test_odd_files_are_left_alone(tmp_path):
    log = tmp_path / "run" / "vis_data"
    log.mkdir(parents=True)
    os.mkfifo(log / "scalars.json")
    os.mkfifo(log / "start_position")
    (log / "events.out.tfevents.1").symlink_to("/dev/zero")
    (log / "events.out.tfevents.2").mkdir()
    (log / "events.out.tfevents.3").write_bytes(b"no records" * 1000)
    (log / "events.out.tfevents.4").symlink_to("absent")
    assert cut_logs([log.parent], LogPosition(3, 3)) == {}
    assert (log / "events.out.tfevents.3").stat().st_size == 10_000


def test_a_line_without_an_end_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(tail, "_LONGEST_LINE", 5_000_000)
    with (tmp_path / "scalars.json").open("wb") as file:
        file.truncate(1 << 40)
    assert cut_json_lines(tmp_path / "scalars.json", 3) == 0
    assert (tmp_path / "scalars.json").stat().st_size == 1 << 40


def test_a_planted_link_under_the_temporary_name_is_not_written_through(tmp_path):
    (tmp_path / "victim").write_text("precious")
    path = tmp_path / "scalars.json"
    path.write_bytes(line(1) + line(2))
    (tmp_path / "second").hardlink_to(path)
    for name in (".scalars.json.cut", ".scalars.json.tmp"):
        (tmp_path / name).symlink_to(tmp_path / "victim")
    assert cut_json_lines(path, 1) == 1
    assert path.read_bytes() == line(1)
    assert (tmp_path / "victim").read_text() == "precious"


@pytest.mark.parametrize("text", ['{"step": ' + "[" * 100_000, '{"step": 1e999}', "[" * 100_000])
def test_lines_of_another_format_stay(tmp_path, text):
    path = tmp_path / "scalars.json"
    path.write_text(text + "\n")
    assert cut_json_lines(path, 3) == (1 if "1e999" in text else 0)
