"""How models are called and where their loss is found."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.model import BaseModel
from torch import nn

from mmtrain.errors import RunError
from mmtrain.runner.model_call import ModelCall, to_device

CPU = torch.device("cpu")


class Plain(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, **batch):
        self.seen = batch
        return self.answer


class Positional(nn.Module):
    def forward(self, x, y):
        return x + y


class Mm(BaseModel):
    def forward(self, x, mode="tensor"):
        self.mode = mode
        return {"loss_a": x, "loss_b": [x, x * 2], "acc": x.mean() * 0 + 5}


def call(model):
    return ModelCall(model, model, CPU)


def test_a_mapping_is_passed_by_name_and_a_tuple_by_position():
    plain = Plain({"loss": torch.tensor(1.0)})
    call(plain)({"x": 1, "y": 2})
    assert plain.seen == {"x": 1, "y": 2}
    assert call(Positional())((torch.tensor(1.0), torch.tensor(2.0))) == torch.tensor(3.0)


@pytest.mark.parametrize("outputs", [{"loss": torch.tensor(2.0)}, SimpleNamespace(loss=torch.tensor(2.0))])
def test_the_loss_of_a_mapping_or_an_object(outputs):
    loss, parts = call(Plain(outputs)).losses(outputs)
    assert loss == 2.0
    assert parts["loss"] == 2.0


def test_every_other_scalar_is_a_part():
    outputs = {"loss": torch.tensor(2.0), "loss_mask": torch.tensor(0.5), "logits": torch.zeros(2, 3)}
    assert set(call(Plain(outputs)).losses(outputs)[1]) == {"loss", "loss_mask"}


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"logits": torch.zeros(1)}, r"keys \['logits'\]. Return dict\(loss=loss\)"),
        ({"loss": torch.zeros(4)}, r"shape \(4,\); expected a scalar"),
        ({"loss": 1.0}, "must return a dict whose .loss. is a tensor; it returned"),
        (None, "a NoneType"),
    ],
)
def test_a_loss_that_cannot_be_minimised_is_refused(outputs, message):
    with pytest.raises(RunError, match=message):
        call(Plain(outputs)).losses(outputs)


def test_a_base_model_is_called_and_parsed_as_mmengine_does():
    model = Mm()
    caller = call(model)
    batch = caller.prepare({"x": torch.tensor([1.0, 3.0])}, training=True)
    outputs = caller(batch)
    assert model.mode == "loss"
    loss, parts = caller.losses(outputs)
    expected_loss, expected_parts = model.parse_losses(outputs)
    assert loss == expected_loss
    assert {name: float(value) for name, value in parts.items()} == {
        name: float(value) for name, value in expected_parts.items()
    }


def test_a_base_model_without_a_loss_is_refused():
    with pytest.raises(RunError, match="'loss' in its name"):
        call(Mm()).losses({"acc": torch.tensor(1.0)})


def test_a_models_own_train_step_is_detected():
    class Own(Mm):
        def train_step(self, data, optim_wrapper):
            return {}

    assert call(Own()).has_own_train_step
    assert not call(Mm()).has_own_train_step
    assert not call(Positional()).has_own_train_step


def test_to_device_keeps_the_structure():
    Point = __import__("collections").namedtuple("Point", "x y")
    moved = to_device({"a": [torch.ones(2), (3, "text")], "p": Point(torch.zeros(1), 2)}, torch.device("meta"))
    assert moved["a"][0].is_meta
    assert moved["a"][1] == (3, "text")
    assert isinstance(moved["p"], Point)
    assert moved["p"].x.is_meta
