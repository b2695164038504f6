import pytest

from mmtrain.checkpoint.format.manifest import FileRecord, Manifest, decode, encode
from mmtrain.errors import CheckpointError


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
