import json
import math
import random

import numpy as np
import pytest
import torch

from mmtrain.errors import RunError
from mmtrain.logging import Scalars
from mmtrain.logging.scalars import FOLD, PACK


def record(scalars, **values):
    for name, value in values.items():
        scalars.record(name, value)


def test_read_gives_means_over_the_interval_and_clears():
    scalars = Scalars()
    reader = scalars.reader("log")
    for value in (1.0, 2.0, 6.0):
        record(scalars, loss=torch.tensor(value), time=value / 10)
    record(scalars, grad_norm=torch.tensor([4.0]))
    assert reader.read() == {"loss": 3.0, "time": pytest.approx(0.3), "grad_norm": 4.0}
    assert reader.read() == {}


def test_every_kind_of_number_and_dtype_is_accepted():
    scalars = Scalars()
    record(
        scalars,
        half=torch.tensor(1.5, dtype=torch.bfloat16),
        double=torch.tensor(0.1, dtype=torch.float64),
        count=torch.tensor(7),
        flag=torch.tensor(True),
        int=3,
        numpy=np.float32(0.5),
    )
    record(scalars, half=2.5)  # a number and a tensor under one name
    assert scalars.reader("log").read() == {
        "half": 2.0, "double": 0.1, "count": 7.0, "flag": 1.0, "int": 3.0, "numpy": 0.5,
    }  # fmt: skip


def test_a_single_float32_reads_back_exactly():
    value = torch.tensor(0.1)
    scalars = Scalars()
    record(scalars, loss=value)
    assert scalars.reader("log").read()["loss"] == value.item()


@pytest.mark.parametrize("value", [torch.zeros(2), torch.zeros(0)])
def test_a_tensor_of_another_size_is_named(value):
    scalars = Scalars()
    record(scalars, loss_a=value)
    with pytest.raises(RunError, match=r"'loss_a' is a tensor of shape .*expected one element"):
        scalars.reader("log").read()


def test_a_value_that_is_not_a_number_is_named():
    scalars = Scalars()
    record(scalars, note="text")
    with pytest.raises(RunError, match="'note' is a str"):
        scalars.reader("log").read()


def test_nothing_is_read_from_the_device_before_read(monkeypatch):
    reads = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(len(self)) or original(self))
    scalars = Scalars()
    reader = scalars.reader("log")
    for _ in range(3 * PACK):
        record(scalars, loss=torch.tensor(1.0))
    record(scalars, a=torch.tensor(1.0), b=torch.tensor(2, dtype=torch.int64), time=0.1)
    assert reads == []
    reader.read()
    assert reads == [3 * PACK + 2]  # one transfer, whatever the names and dtypes


def test_memory_is_bounded_when_a_reader_does_not_read():
    scalars = Scalars()
    reader = scalars.reader("log")
    total = PACK * FOLD + 5
    for number in range(total):
        record(scalars, x=number)
    (rank,) = scalars.state_dict()["ranks"]
    assert len(rank["readers"]["log"]["values"]["x"]) == 5  # the others are one number
    assert reader.read() == {"x": math.fsum(range(total)) / total}


def test_nothing_is_kept_without_a_reader():
    scalars = Scalars()
    for number in range(PACK * FOLD + 5):
        record(scalars, x=number)
    assert scalars.reader("late").read() == {"x": PACK * FOLD + 2}  # the last five


def test_maxima_are_kept():
    scalars = Scalars(maxima=("memory",))
    for value in (3, 9, 4):
        record(scalars, memory=value)
    assert scalars.reader("log").read() == {"memory": 9.0}


def test_nan_and_infinity_are_kept():
    scalars = Scalars()
    for value in (math.inf, -math.inf):
        record(scalars, mixed=value)
    record(scalars, nan=torch.tensor(math.nan))
    for _ in range(2):
        record(scalars, huge=1.7e308)
    found = scalars.reader("log").read()
    assert math.isnan(found["mixed"])
    assert math.isnan(found["nan"])
    assert found["huge"] == math.inf


def test_latest_is_the_result_of_the_last_read():
    scalars = Scalars()
    reader, other = scalars.reader("log"), scalars.reader("other")
    assert scalars.latest("loss") is None
    record(scalars, loss=2.0)
    assert scalars.latest("loss") is None
    reader.read()
    record(scalars, time=1.0)
    reader.read()
    assert scalars.latest("loss") == 2.0
    record(scalars, loss=4.0)
    other.read()
    assert scalars.latest("loss") == 3.0


def test_each_reader_has_the_means_of_its_own_interval():
    scalars = Scalars()
    readers = {interval: scalars.reader(f"every {interval}") for interval in (3, 5)}
    found = []
    for number in range(1, 16):
        record(scalars, loss=torch.tensor(float(number)))
        found += [(interval, readers[interval].read()["loss"]) for interval in readers if number % interval == 0]
    assert found == [(3, 2.0), (5, 3.0), (3, 5.0), (3, 8.0), (5, 8.0), (3, 11.0), (3, 14.0), (5, 13.0)]


def test_a_reader_that_comes_later_sees_what_is_recorded_from_then_on():
    scalars = Scalars()
    record(scalars, x=1.0)
    first = scalars.reader("first")
    record(scalars, x=3.0)
    second = scalars.reader("second")
    record(scalars, x=5.0)
    assert (first.read(), second.read()) == ({"x": 3.0}, {"x": 5.0})
    record(scalars, x=7.0)
    assert scalars.reader("second").read() == {"x": 7.0}  # the same reader again


@pytest.mark.parametrize("cut", [0, 1, 37, PACK, PACK + 1, 2 * PACK])
def test_an_interval_interrupted_by_a_restart_has_the_same_mean_bit_for_bit(cut):
    values = [random.Random(cut).uniform(-1e3, 1e3) for _ in range(2 * PACK + 10)]

    def feed(scalars, part):
        reader = scalars.reader("log")
        for value in part:
            record(scalars, loss=torch.tensor(value), time=value)
        return reader

    expected = feed(Scalars(), values).read()
    first = Scalars()
    feed(first, values[:cut])
    state = first.state_dict()
    reader = feed(first, values[cut:])  # the run that was only saved continues
    resumed = Scalars()
    resumed.load_state_dict(state)
    assert reader.read() == expected
    assert feed(resumed, values[cut:]).read() == expected


def test_a_restart_across_a_fold_changes_nothing(monkeypatch):
    monkeypatch.setattr("mmtrain.logging.scalars.PACK", 8)
    monkeypatch.setattr("mmtrain.logging.scalars.FOLD", 4)
    values = [random.Random(1).uniform(-1, 1) for _ in range(200)]
    names = ("log", "slow")
    uninterrupted, part = Scalars(), Scalars()
    readers = [[scalars.reader(name) for name in names] for scalars in (uninterrupted, part)]
    for number, value in enumerate(values):
        record(uninterrupted, x=value)
        record(part, x=value)
        if number == 100:
            assert readers[0][0].read() == readers[1][0].read()
        if number % 7 == 0:
            restored = Scalars()
            restored.load_state_dict(json.loads(json.dumps(part.state_dict())))
            part, readers[1] = restored, [restored.reader(name) for name in names]
    assert [reader.read() for reader in readers[0]] == [reader.read() for reader in readers[1]]


def test_a_state_restores_the_readers_that_exist_and_those_that_come_later():
    saved = Scalars()
    saved.reader("a")
    record(saved, x=1.0)
    saved.reader("b")
    record(saved, x=3.0)
    state = json.loads(json.dumps(saved.state_dict()))
    restored = Scalars()
    existing = restored.reader("b")
    record(restored, x=100.0)  # before the resume: not part of the saved run
    restored.load_state_dict(state)
    record(restored, x=5.0)
    assert existing.read() == {"x": 4.0}
    assert restored.reader("a").read() == {"x": 2.0}
    assert restored.reader("new").read() == {}


def test_a_removed_reader_is_no_longer_saved():
    saved = Scalars()
    saved.reader("gone")
    record(saved, x=1.0)
    restored = Scalars()
    restored.load_state_dict(saved.state_dict())
    restored.reader("log")
    (rank,) = restored.state_dict()["ranks"]
    assert list(rank["readers"]) == ["log"]


def test_a_state_of_more_ranks_is_restored_completely():
    scalars = Scalars()
    ranks = [
        {"readers": {"log": {"values": {"loss": [1.0, 2.0]}, "folded": {}}}},
        {"readers": {"log": {"values": {"loss": [6.0]}, "folded": {"x": [4.0, 2]}}}},
    ]
    scalars.load_state_dict({"ranks": ranks})
    assert scalars.reader("log").read() == {"loss": 3.0, "x": 2.0}


@pytest.mark.parametrize("exists", [True, False])
def test_a_state_without_readers_is_given_to_every_reader(exists):
    """Checkpoints written before readers had names."""
    scalars = Scalars()
    if exists:
        scalars.reader("log")
    ranks = [{"values": {"loss": [1.0, 2.0]}, "folded": {}}, {"values": {"loss": [6.0]}, "folded": {"x": [4.0, 2]}}]
    scalars.load_state_dict({"ranks": ranks})
    for name in ("log", "other"):
        assert scalars.reader(name).read() == {"loss": 3.0, "x": 2.0}


@pytest.mark.parametrize("values", [["x"], [None], [[1.0]], "ab"])
def test_a_saved_value_that_is_no_number_is_refused_at_once(values):
    scalars = Scalars()
    scalars.reader("logger")
    scalars.record("loss", 1.0)
    state = scalars.state_dict()
    state["ranks"][0]["readers"]["logger"]["values"]["loss"] = values
    with pytest.raises(TypeError, match="a value of the scalar 'loss' is a"):
        Scalars().load_state_dict(state)
