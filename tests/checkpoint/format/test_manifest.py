import json

import pytest

from mmtrain.checkpoint.format.manifest import FileRecord, Manifest, decode, encode
from mmtrain.errors import CheckpointError
from mmtrain.files import hash_bytes


def example() -> Manifest:
    return Manifest(
        name="iter_7.pth",
        files={"model/a.safetensors": FileRecord(12, "ab" * 16)},
        position={"iteration": 7, "epoch": 2},
        strategy="SingleDeviceStrategy",
        seed=3,
        config="x = '" + "0" * 32 + "'\n",  # looks like the blank checksum
        versions={"torch": "2.13"},
        meta={"by": "hook", "nested": [1, 2.5, None]},
    )


def test_round_trip():
    manifest = example()
    assert decode(encode(manifest)) == manifest
    assert (manifest.iteration, manifest.epoch, manifest.bytes) == (7, 2, 12)


def test_every_flipped_byte_is_detected():
    data = encode(example())
    for place in range(len(data)):
        for bit in (0, 5):  # bit 5 turns a into A
            damaged = bytearray(data)
            damaged[place] ^= 1 << bit
            with pytest.raises(CheckpointError, match=r"here\.json"):
                decode(bytes(damaged), "here.json")


def test_every_truncation_is_detected():
    data = encode(example())
    for length in range(len(data)):
        with pytest.raises(CheckpointError):
            decode(data[:length])


def test_a_newer_format_is_named():
    data = encode(example()).replace(b'"format": 1', b'"format": 2')
    with pytest.raises(CheckpointError, match="format 2, but this version of mmtrain reads format 1"):
        decode(data)


def test_paths_must_stay_inside():
    for path in ("../x", "/etc/passwd", "a/../../b", ""):
        manifest = example()
        manifest.files = {path: FileRecord(1, "0" * 32)}
        with pytest.raises(CheckpointError, match="is not inside the checkpoint"):
            decode(encode(manifest))


def test_other_json_is_not_a_manifest():
    for data in (b"[]", b"3", b"{}", b'{"checksum": 3}', b'{"checksum": "", "format": 1}'):
        with pytest.raises(CheckpointError):
            decode(data)


def test_values_that_are_not_json_are_refused():
    for value in (object(), float("nan")):
        with pytest.raises(CheckpointError, match=r"iter_7\.pth cannot be written as JSON"):
            encode(Manifest(name="iter_7.pth", meta={"x": value}))


def changed(**values) -> bytes:
    """A manifest with other values and a checksum that fits, as `encode` would not write it."""
    document = {**json.loads(encode(example())), **values, "checksum": "0" * 32}
    text = json.dumps(document)
    head, _, tail = text.rpartition("0" * 32)
    return (head + hash_bytes(text.encode()) + tail).encode()


MALFORMED = {
    "world_size": [0, -1, True, 1.5, "2", None, 10**9, 10**30],
    "seed": ["3", 1.5, 10**40, []],
    "position": [None, [], {"iteration": "7"}, {"iteration": -1}, {"iteration": 1 << 64}],
    "files": [None, [], {"a": None}, {"a": {"size": 1}}, {"a": {"size": -1, "xxh3_128": "0" * 32}}],
    "versions": [{"torch": 2}],
    "sections": ["model", [3]],
    "temporary": [1, "no"],
    "config": [None, 3],
    "parts": [{}, [3], [{"marker": "absent", "ranks": [0], "files": []}]],
    "meta": [
        None, {"generation": -1}, {"batch_size": 0}, {"accumulative_counts": "1"}, {"config_values": {"a": 1}},
        {"native": {"stage": "2"}}, {"frozen": {"types": "x", "hash": "y"}}, {"has_frozen": "yes"}, {"run": 3},
    ],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in MALFORMED.items() for value in values])
def test_a_field_of_another_type_is_named(name, value):
    with pytest.raises(CheckpointError, match=rf"here: a field of format 1 .*\({name}.* (is|names|expected)"):
        decode(changed(**{name: value}), "here")


@pytest.mark.parametrize("path", ["a\0b", "\ud800", "a\x1b[2J", "x" * 2_000])
def test_a_file_name_that_no_save_writes(path):
    with pytest.raises(CheckpointError, match="is not inside the checkpoint") as caught:
        decode(changed(files={path: {"size": 1, "xxh3_128": "0" * 32}}))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("data", [b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5_000, b"\xff\xfe", b"NaN"])
def test_what_is_no_json_of_a_manifest(data):
    with pytest.raises(CheckpointError, match="here: not"):
        decode(data, "here")


def test_a_wrong_type_is_refused_before_it_is_written():
    with pytest.raises(CheckpointError, match=r"the manifest of iter_7\.pth: .*meta\.generation is -1"):
        encode(Manifest(name="iter_7.pth", meta={"generation": -1}))
