import pytest

from mmtrain.checkpoint.format.index import PieceEntry, TensorEntry, decode_index, encode_index, merge
from mmtrain.errors import CheckpointError


def piece(file: str, offset: int, length: int) -> PieceEntry:
    return PieceEntry(file, 64, (offset,), (length,))


def test_round_trip():
    index = {
        "model": {
            "w": TensorEntry("F32", (4,), (piece("a", 0, 3), piece("b", 3, 1))),
            "tied": TensorEntry("F32", (4,), alias="w"),
            "scalar": TensorEntry("I64", (), (PieceEntry("a", 8, (), ()),)),
        }
    }
    assert decode_index(encode_index(index)) == index


def test_ranks_are_joined():
    first = {"model": {"w": TensorEntry("F32", (4,), (piece("a", 0, 3),)), "t": TensorEntry("F32", (4,), alias="w")}}
    second = {"model": {"w": TensorEntry("F32", (4,), (piece("b", 3, 1),))}, "ema": {}}
    merged = merge([first, second])
    assert merged["model"]["w"].pieces == (piece("a", 0, 3), piece("b", 3, 1))
    assert merged["model"]["t"].alias == "w"
    assert list(merged) == ["ema", "model"]


def test_a_missing_or_contradicting_part_is_refused():
    part = {"model": {"w": TensorEntry("F32", (4,), (piece("a", 0, 3),))}}
    with pytest.raises(CheckpointError, match="model/w: the ranks hold 3 of its 4 elements"):
        merge([part])
    other = {"model": {"w": TensorEntry("BF16", (4,), (piece("b", 3, 1),))}}
    with pytest.raises(CheckpointError, match=r"model/w: .*BF16\[4\], F32\[4\]"):
        merge([part, other])


@pytest.mark.parametrize(
    "data", [b"", b"[]", b'{"m": 3}', b'{"m": {"w": {}}}', b'{"m":{"w":{"dtype":"F32","shape":3}}}']
)
def test_malformed(data):
    with pytest.raises(CheckpointError, match="where"):
        decode_index(data, "where")


def test_paths_must_stay_inside():
    index = {"m": {"w": TensorEntry("F32", (4,), (piece("../../x", 0, 4),))}}
    with pytest.raises(CheckpointError, match="inside"):
        decode_index(encode_index(index))
