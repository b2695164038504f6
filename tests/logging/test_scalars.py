import math
import random

import numpy as np
import pytest
import torch

from mmtrain.errors import RunError
from mmtrain.logging import Scalars
from mmtrain.logging.scalars import FOLD, PACK


def test_read_gives_means_over_the_interval_and_clears():
    scalars = Scalars()
    for value in (1.0, 2.0, 6.0):
        scalars.record("loss", torch.tensor(value))
        scalars.record("time", value / 10)
    scalars.record("grad_norm", torch.tensor([4.0]))
    assert scalars.read() == {"loss": 3.0, "time": pytest.approx(0.3), "grad_norm": 4.0}
    assert scalars.read() == {}


def test_every_kind_of_number_and_dtype_is_taken():
    scalars = Scalars()
    scalars.record_all(
        {
            "half": torch.tensor(1.5, dtype=torch.bfloat16),
            "double": torch.tensor(0.1, dtype=torch.float64),
            "count": torch.tensor(7),
            "flag": torch.tensor(True),
            "int": 3,
            "numpy": np.float32(0.5),
        }
    )
    scalars.record("half", 2.5)  # a number and a tensor under one name
    assert scalars.read() == {"half": 2.0, "double": 0.1, "count": 7.0, "flag": 1.0, "int": 3.0, "numpy": 0.5}


def test_a_single_float32_reads_back_exactly():
    value = torch.tensor(0.1)
    scalars = Scalars()
    scalars.record("loss", value)
    assert scalars.read()["loss"] == value.item()


@pytest.mark.parametrize("value", [torch.zeros(2), torch.zeros(0)])
def test_a_tensor_of_another_size_is_named(value):
    scalars = Scalars()
    scalars.record("loss_a", value)
    with pytest.raises(RunError, match=r"'loss_a' is a tensor of shape .*expected one element"):
        scalars.read()


def test_a_value_that_is_no_number_is_named():
    scalars = Scalars()
    scalars.record("note", "text")
    with pytest.raises(RunError, match="'note' is a str"):
        scalars.read()


def test_nothing_is_read_from_the_device_before_read(monkeypatch):
    reads = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(len(self)) or original(self))
    scalars = Scalars()
    for _ in range(3 * PACK):
        scalars.record("loss", torch.tensor(1.0))
    scalars.record_all({"a": torch.tensor(1.0), "b": torch.tensor(2, dtype=torch.int64), "time": 0.1})
    assert reads == []
    scalars.read()
    assert reads == [3 * PACK + 2]  # one transfer, whatever the names and dtypes


def test_memory_is_bounded_when_nobody_reads():
    scalars = Scalars()
    total = PACK * FOLD + 5
    for number in range(total):
        scalars.record("x", number)
    held = len(scalars._pending["x"]) + sum(len(pack) for pack in scalars._packs["x"])
    assert held == 5
    assert scalars.read() == {"x": math.fsum(range(total)) / total}


def test_maxima_are_maxima():
    scalars = Scalars(maxima=("memory",))
    for value in (3, 9, 4):
        scalars.record("memory", value)
    assert scalars.read() == {"memory": 9.0}


def test_nan_and_infinity_come_through():
    scalars = Scalars()
    for value in (math.inf, -math.inf):
        scalars.record("mixed", value)
    scalars.record("nan", torch.tensor(math.nan))
    scalars.record("huge", 1.7e308)
    scalars.record("huge", 1.7e308)
    found = scalars.read()
    assert math.isnan(found["mixed"])
    assert math.isnan(found["nan"])
    assert found["huge"] == math.inf


def test_latest_is_what_the_last_read_gave():
    scalars = Scalars()
    assert scalars.latest("loss") is None
    scalars.record("loss", 2.0)
    assert scalars.latest("loss") is None
    scalars.read()
    scalars.record("time", 1.0)
    scalars.read()
    assert scalars.latest("loss") == 2.0


@pytest.mark.parametrize("cut", [0, 1, 37, PACK, PACK + 1, 2 * PACK])
def test_an_interval_cut_by_a_restart_has_the_same_mean_to_the_bit(cut):
    values = [random.Random(cut).uniform(-1e3, 1e3) for _ in range(2 * PACK + 10)]

    def feed(scalars, part):
        for value in part:
            scalars.record("loss", torch.tensor(value))
            scalars.record("time", value)

    whole = Scalars()
    feed(whole, values)
    first = Scalars()
    feed(first, values[:cut])
    state = first.state_dict()
    feed(first, values[cut:])  # the run that was only saved goes on
    resumed = Scalars()
    resumed.load_state_dict(state)
    feed(resumed, values[cut:])
    expected = whole.read()
    assert first.read() == expected
    assert resumed.read() == expected


def test_a_restart_across_a_fold_changes_nothing(monkeypatch):
    monkeypatch.setattr("mmtrain.logging.scalars.PACK", 8)
    monkeypatch.setattr("mmtrain.logging.scalars.FOLD", 4)
    values = [random.Random(1).uniform(-1, 1) for _ in range(200)]
    whole, part = Scalars(), Scalars()
    for number, value in enumerate(values):
        whole.record("x", value)
        part.record("x", value)
        if number % 7 == 0:
            restored = Scalars()
            restored.load_state_dict(part.state_dict())
            part = restored
    assert part.read() == whole.read()


def test_the_state_is_plain_and_fits_json():
    import json

    scalars = Scalars()
    scalars.record("loss", torch.tensor(0.1))
    assert json.loads(json.dumps(scalars.state_dict())) == scalars.state_dict()


def test_a_state_of_more_ranks_is_taken_whole():
    scalars = Scalars()
    ranks = [{"values": {"loss": [1.0, 2.0]}, "folded": {}}, {"values": {"loss": [6.0]}, "folded": {"x": [4.0, 2]}}]
    scalars.load_state_dict({"ranks": ranks})
    assert scalars.read() == {"loss": 3.0, "x": 2.0}
