from contextlib import suppress

import pytest
from torch import nn

from mmtrain.modes import begin_training, evaluation_mode, modes_kept


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize("error", [None, ValueError])
def test_every_module_is_in_the_mode_it_was_in(error):
    model = nn.Sequential(nn.Dropout(), nn.Linear(1, 1)).train()
    model[0].eval()
    with suppress(ValueError), evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        if error:
            raise error
    assert [module.training for module in model.modules()] == [True, False, True]


class Merging(nn.Module):
    """Merges something in evaluation mode, as LoRA layers do in ``train()``."""

    def __init__(self):
        super().__init__()
        self.merged = False

    def train(self, mode=True):
        self.merged = not mode
        return super().train(mode)


def test_modes_are_set_by_train_which_modules_override():
    model = nn.Sequential(Merging(), nn.Sequential(Merging(), nn.Dropout()))
    model[1].eval()
    with modes_kept(model):
        model.eval()
        assert model[0].merged
        model.train()
    assert modes(model) == {"": True, "0": True, "1": False, "1.0": False, "1.1": False}
    assert (model[0].merged, model[1][0].merged) == (False, True)


class Pretrained(nn.Sequential):
    @classmethod
    def from_pretrained(cls):
        return cls(nn.Linear(1, 1), nn.Dropout()).eval()


def test_what_init_put_into_evaluation_mode_stays_in_it():
    model = nn.Sequential(nn.BatchNorm1d(1), nn.Sequential(nn.Dropout(), nn.Linear(1, 1)), nn.Linear(1, 1))
    model[0].eval()
    model[1].eval()
    lines = begin_training(nn.Sequential(model), model)
    assert modes(model) == {"": True, "0": False, "1": False, "1.0": False, "1.1": False, "2": True}
    assert len(lines) == 1
    assert "stay in it: 0, 1. Call train() on them in __init__ if they should train" in lines[0]


def test_a_model_from_pretrained_trains():
    """Also as the whole model, and beside a part that stays in evaluation mode."""
    model = Pretrained.from_pretrained()
    assert begin_training(model, model) == []
    assert all(modes(model).values())
    whole = nn.Sequential(Pretrained.from_pretrained(), nn.Dropout().eval(), nn.Linear(1, 1))
    lines = begin_training(whole, whole)
    assert modes(whole) == {"": True, "0": True, "0.0": True, "0.1": True, "1": False, "2": True}
    assert "stay in it: 1. " in lines[0]
    assert lines[1].startswith("Set to training mode: 0 (from_pretrained returned it in evaluation mode).")
    assert len(lines) == 2


def test_a_model_that_is_in_evaluation_mode_as_a_whole_trains():
    model = nn.Sequential(nn.Dropout()).eval()
    assert begin_training(model, model) == []
    assert all(modes(model).values())
