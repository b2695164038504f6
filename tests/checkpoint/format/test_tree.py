import json
import math
import random
import struct
from collections import OrderedDict, defaultdict, namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

from mmtrain import randomness
from mmtrain.checkpoint.format.tree import join, split, to_json
from mmtrain.errors import CheckpointError


def again(value):
    document, tensors = split(value)
    return join(json.loads(to_json(document)), tensors)


PLAIN = [
    None, True, False, 0, -1, 2**63 - 1, -(2**63), 2**63, -(2**200), 0.0, -0.0, 0.1, 1e-320, 1.7976931348623157e308,
    math.inf, -math.inf, "", "ü\ud800\0$", b"", b"\0\xff", [], (), {}, [1, [2, (3, [])]], (1,), ((),),
    {"a": {"b": [None]}}, {1: "x", "1": "y", None: 0, (1, "a"): 2, 2.5: 3}, {True: 4}, {"$float": 0}, {"a": 1, "$b": 2},
    {"$tensor": "state"}, set(), {1, "a", (2, 3)}, frozenset({1}), {frozenset({1}): 1}, "$tuple", 10**6000,
]  # fmt: skip


@pytest.mark.parametrize("value", PLAIN, ids=lambda v: str(type(v).__name__))
def test_plain_values_come_back_equal_and_of_the_same_type(value):
    back = again(value)
    assert back == value
    assert type(back) is type(value)
    if isinstance(value, float):
        assert struct.pack("d", back) == struct.pack("d", value)


def test_types_inside_containers_are_restored():
    back = again([(1, 2), {"k": (True, 1, 1.0)}, OrderedDict([("b", 1), ("a", (2,))])])
    assert type(back[0]) is tuple
    assert [type(v) for v in back[1]["k"]] == [bool, int, float]
    assert type(back[2]) is OrderedDict
    assert list(back[2].items()) == [("b", 1), ("a", (2,))]


def test_the_order_of_keys_is_kept():
    assert list(again({"z": 1, "a": 2, "m": 3})) == ["z", "a", "m"]


def test_nan_keeps_its_bits():
    nan = struct.unpack(">d", bytes.fromhex("7ff80000deadbeef"))[0]
    assert struct.pack(">d", again([nan])[0]).hex() == "7ff80000deadbeef"


def test_tensors_are_copies_with_their_path_as_key():
    source = torch.arange(3.0)
    document, tensors = split({"hooks": [source, {"x": torch.tensor(2, dtype=torch.bfloat16)}]})
    source.zero_()
    assert sorted(tensors) == ["state.hooks[0]", "state.hooks[1].x"]
    back = join(document, tensors)
    assert torch.equal(back["hooks"][0], torch.arange(3.0))
    assert back["hooks"][1]["x"].dtype == torch.bfloat16


LAYOUTS = {
    "coo": lambda: torch.eye(3).to_sparse(),
    "repeated": lambda: torch.sparse_coo_tensor([[0, 0, 2], [1, 1, 0]], [1.0, 2.0, 3.0], (3, 4), check_invariants=True),
    "hybrid": lambda: torch.eye(3).unsqueeze(-1).repeat(1, 1, 2).to_sparse(2),
    "csr": lambda: torch.eye(3, dtype=torch.complex128).to_sparse_csr(),
    "csc": lambda: torch.tensor([[0.0, 2, 0], [1, 0, 0]]).to_sparse_csc(),
    "bsr": lambda: torch.eye(4).to_sparse_bsr((2, 2)),
    "empty": lambda: torch.zeros(2, 2).to_sparse(),
}


@pytest.mark.filterwarnings("ignore:Sparse .* support is in beta")
@pytest.mark.parametrize("name", LAYOUTS)
def test_sparse_tensors(name):
    value = LAYOUTS[name]()
    back = again({"x": [value]})["x"][0]
    assert (back.layout, back.dtype, back.shape) == (value.layout, value.dtype, value.shape)
    assert torch.equal(back.to_dense(), value.to_dense())
    if value.layout is torch.sparse_coo:
        assert back.is_coalesced() == value.is_coalesced()
        assert torch.equal(back._values(), value._values())


def test_a_malformed_sparse_tensor_is_refused():
    document, tensors = split(torch.eye(3).to_sparse())
    for change in ({"shape": [1, 1]}, {"$sparse": "sparse_bread"}, {"parts": []}):
        with pytest.raises(CheckpointError, match="malformed"):
            join({**document, **change}, tensors)


def test_two_tensors_of_one_path():
    back = again({1: torch.tensor(1), "1": torch.tensor(2)})
    assert (int(back[1]), int(back["1"])) == (1, 2)


def test_parameters_become_plain_tensors():
    assert type(again(torch.nn.Parameter(torch.ones(2)))) is torch.Tensor


@pytest.mark.parametrize("dtype", ["f8", ">f4", "u2", "?", "c16", "<U3", "S4", "M8[ns]", "f2"])
def test_numpy(dtype):
    array = np.arange(6).reshape(2, 3).astype("M8[ns]" if dtype.startswith("M") else dtype)
    for value in (array, array.T, array[:0], array[0, 0], np.array(array[0, 0])):
        back = again(value)
        assert type(back) is type(value)
        assert back.dtype == value.dtype
        assert np.array_equal(back, value)
    assert again(array).flags.writeable


def test_generator_states_are_restored_and_take_effect():
    random.random(), np.random.rand(), torch.rand(1)
    saved = again(randomness.capture())
    first = random.random(), np.random.rand(), np.random.randn(), torch.rand(3).tolist()
    randomness.restore(saved)
    assert (random.random(), np.random.rand(), np.random.randn(), torch.rand(3).tolist()) == first


Point = namedtuple("Point", "x y")


class Odd(dict):
    pass


@pytest.mark.parametrize(
    "value",
    [object(), Path("/x"), Point(1, 2), Odd(), defaultdict(int), 1j, torch.float32, lambda: 0, range(3), slice(1),
     np.array([object()]), np.ma.masked_array([1, 2], [0, 1]), torch.ones(2, device="meta")],
    ids=lambda v: type(v).__name__,
)  # fmt: skip
def test_anything_else_is_refused_by_path_and_type(value):
    with pytest.raises(CheckpointError, match=rf"^state\.hooks\[1\]\.k: .*{type(value).__name__}"):
        split({"hooks": [0, {"k": value}]})


def test_a_value_that_contains_itself():
    value: list = []
    value.append({"x": value})
    with pytest.raises(CheckpointError, match=r"state\[0\]\.x: it contains itself"):
        split(value)
    shared = [1]
    assert again([shared, shared]) == [[1], [1]]


@pytest.mark.parametrize(
    "document",
    [{"$new": 1}, {"$tensor": "gone"}, {"$float": "zz"}, {"$array": "gone"}, {"$bytes": "*"}, {"$dict": [1]}],
)
def test_malformed_documents(document):
    with pytest.raises(CheckpointError, match=next(iter(document)).replace("$", r"\$")):
        join(document, {})
