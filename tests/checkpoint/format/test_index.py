import json

import pytest

from mmtrain.checkpoint.format import check, tree
from mmtrain.checkpoint.format.index import ShardEntry, TensorEntry, decode_index, encode_index, merge
from mmtrain.errors import CheckpointError


def shard(file: str, offset: int, length: int) -> ShardEntry:
    return ShardEntry(file, 64, (offset,), (length,))


def test_round_trip():
    index = {
        "model": {
            "w": TensorEntry("F32", (4,), (shard("a", 0, 3), shard("b", 3, 1))),
            "tied": TensorEntry("F32", (4,), alias="w"),
            "scalar": TensorEntry("I64", (), (ShardEntry("a", 8, (), ()),)),
        }
    }
    assert decode_index(encode_index(index)) == index


def test_indexes_of_ranks_are_joined():
    first = {"model": {"w": TensorEntry("F32", (4,), (shard("a", 0, 3),)), "t": TensorEntry("F32", (4,), alias="w")}}
    second = {"model": {"w": TensorEntry("F32", (4,), (shard("b", 3, 1),))}, "ema": {}}
    merged = merge([first, second])
    assert merged["model"]["w"].shards == (shard("a", 0, 3), shard("b", 3, 1))
    assert merged["model"]["t"].alias == "w"
    assert list(merged) == ["ema", "model"]


def test_a_missing_or_contradicting_part_is_refused():
    part = {"model": {"w": TensorEntry("F32", (4,), (shard("a", 0, 3),))}}
    with pytest.raises(CheckpointError, match="model/w: the ranks hold 3 of its 4 elements"):
        merge([part])
    other = {"model": {"w": TensorEntry("BF16", (4,), (shard("b", 3, 1),))}}
    with pytest.raises(CheckpointError, match=r"model/w: .*BF16\[4\], F32\[4\]"):
        merge([part, other])


@pytest.mark.parametrize(
    "data", [b"", b"[]", b'{"m": 3}', b'{"m": {"w": {}}}', b'{"m":{"w":{"dtype":"F32","shape":3}}}']
)
def test_malformed(data):
    with pytest.raises(CheckpointError, match="where"):
        decode_index(data, "where")


def test_paths_must_stay_inside():
    index = {"m": {"w": TensorEntry("F32", (4,), (shard("../../x", 0, 4),))}}
    with pytest.raises(CheckpointError, match="inside"):
        decode_index(encode_index(index))


def test_copies_of_a_box_are_one_shard_with_several_locations():
    def index(file, offset=0, rows=4):
        shard = ShardEntry(file, 8, (offset, 0), (rows, 2))
        return {"model": {"w": TensorEntry("F32", (4, 2), (shard,))}}

    parts = [index("rank_0"), index("rank_2")]
    with pytest.raises(CheckpointError, match="hold 16 of its 8 elements"):
        merge(parts)
    merged = merge(parts, copies=True)
    (shard,) = merged["model"]["w"].shards
    assert [location.file for location in shard.locations()] == ["rank_0", "rank_2"]
    assert decode_index(encode_index(merged)) == merged
    halves = merge([index("rank_0", 0, 2), index("rank_1", 2, 2), index("rank_2", 0, 2)], copies=True)
    assert [len(shard.copies) for shard in halves["model"]["w"].shards] == [1, 0]
    with pytest.raises(CheckpointError, match="hold 4 of its 8 elements"):
        merge([index("rank_0", 0, 2), index("rank_2", 0, 2)], copies=True)
    escaping = encode_index(merged).replace(b'"rank_2"', b'"../rank"')
    with pytest.raises(CheckpointError, match="is not inside the checkpoint"):
        decode_index(escaping)


def test_what_no_reader_takes_is_not_written(monkeypatch):
    monkeypatch.setattr(check, "JSON_LIMIT", 100)
    with pytest.raises(CheckpointError, match=r"tensors\.json has \d+ bytes of JSON, and a reader takes 100 at most"):
        encode_index({"model": {f"w{i}": TensorEntry("F32", (4,), (shard("a", 0, 4),)) for i in range(9)}})
    with pytest.raises(CheckpointError, match="the state has 205 bytes"):
        tree.to_json(["x"] * 50 + ["y"])


def entry(**changes):
    piece = {"file": "a", "start": 0, "offsets": [0], "shape": [4]}
    return {"dtype": "F32", "shape": [4], "pieces": [piece], **changes}


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        (entry(shape=[5]), "not all of its 5 elements"),
        (entry(shape=[-1]), "expected a list of at most 64 sizes"),
        (entry(shape=[True]), "expected a list of at most 64 sizes"),
        (entry(shape=[10**30]), "expected a list of at most 64 sizes"),
        (entry(pieces=[{"file": "a", "start": 0, "offsets": [3], "shape": [4]}]), "is not inside"),
        (entry(pieces=[{"file": "a", "start": 0, "offsets": [0, 0], "shape": [4]}]), "is not inside"),
        (entry(pieces=[{"file": "a\0", "start": 0, "offsets": [0], "shape": [4]}]), "not inside the checkpoint"),
        (entry(pieces=[{"file": "a", "start": -1, "offsets": [0], "shape": [4]}]), "start is -1"),
        (entry(pieces=3), "pieces is 3, expected a list"),
        (entry(alias="gone"), "is an alias of 'gone', which is not a tensor"),
        (entry(alias="w"), "is an alias of 'w', which is not a tensor"),
        (entry(dtype=None), "dtype is null, expected text"),
        ([], "expected an object"),
    ],
)
def test_a_malformed_entry_is_named(changed, fault):
    with pytest.raises(CheckpointError, match=f"where: .*{fault}"):
        decode_index(json.dumps({"model": {"w": changed}}).encode(), "where")
