"""Collate functions and how a config names them."""

from functools import partial

import numpy as np
import pytest
import torch
from mmengine.structures import BaseDataElement

from mmtrain.data import pad_collate, resolve_collate
from mmtrain.data.collate import is_built_in
from mmtrain.errors import ConfigError


def resolve(cfg):
    return resolve_collate(cfg, path="train_dataloader.collate_fn")


def test_the_default_stacks():
    batch = resolve(None)([{"x": torch.zeros(2), "y": 1}, {"x": torch.ones(2), "y": 2}])
    assert batch["x"].shape == (2, 2)
    assert batch["y"].tolist() == [1, 2]


@pytest.mark.parametrize("cfg", ["pseudo_collate", dict(type="pseudo_collate"), "mmengine.pseudo_collate"])
def test_pseudo_collate_groups_as_in_mmengine(cfg):
    element = BaseDataElement()
    batch = resolve(cfg)([{"x": torch.zeros(2), "e": element}, {"x": torch.zeros(3), "e": element}])
    assert [tensor.shape for tensor in batch["x"]] == [(2,), (3,)]
    assert batch["e"] == [element, element]


def test_the_named_default_collate_is_mmengines():
    element = BaseDataElement()
    batch = resolve("default_collate")([{"x": torch.zeros(2), "e": element}] * 3)
    assert batch["x"].shape == (3, 2)
    assert batch["e"] == [element] * 3


def test_pad_collate_pads_at_the_end():
    samples = [{"ids": [1, 2], "image": torch.ones(1, 2, 3)}, {"ids": [3, 4, 5], "image": torch.ones(1, 3, 2)}]
    batch = resolve(dict(type="pad_collate", pad_value=dict(ids=-100)))(samples)
    assert batch["ids"].tolist() == [[1, 2, -100], [3, 4, 5]]
    assert batch["image"].shape == (2, 1, 3, 3)
    assert batch["image"].sum() == 12
    assert batch["image"][0, 0].tolist() == [[1, 1, 1], [1, 1, 1], [0, 0, 0]]


def test_pad_collate_takes_sequences_tensors_arrays_and_what_is_neither():
    pair = pad_collate([(np.ones(1, np.float32), 3), (np.ones(2, np.float32), 4)], pad_value=9)
    assert pair[0].tolist() == [[1, 9], [1, 1]]
    assert pair[0].dtype == torch.float32
    assert pair[1].tolist() == [3, 4]
    assert pad_collate([torch.tensor([1]), torch.tensor([1, 2])]).tolist() == [[1, 0], [1, 2]]
    assert pad_collate([{"name": "a"}, {"name": "b"}]) == {"name": ["a", "b"]}


def test_pad_collate_pads_only_the_given_keys():
    samples = [{"x": torch.zeros(2)}, {"x": torch.zeros(3)}]
    assert pad_collate(samples, keys=["x"])["x"].shape == (2, 3)
    with pytest.raises(RuntimeError):
        pad_collate(samples, keys=["y"])


class Collator:
    def __init__(self, scale=1):
        self.scale = scale

    def __call__(self, samples):
        return sum(samples) * self.scale


def add(samples, scale=1):
    return sum(samples) * scale


def test_functions_and_classes_are_accepted():
    assert resolve(add) is add
    assert resolve(dict(type=add, scale=2))([1, 2]) == 6
    assert resolve(dict(type=Collator, scale=3))([1, 2]) == 9
    assert [is_built_in(resolve(cfg)) for cfg in (None, "pad_collate", dict(type="pad_collate", pad_value=1))] == [
        True
    ] * 3
    assert not is_built_in(partial(add, scale=2))


@pytest.mark.parametrize("cfg", ["pad_colate", 3, dict(pad_value=1), dict(type="no_such_function")])
def test_wrong_values_are_refused_with_their_path(cfg):
    with pytest.raises(ConfigError, match=r"train_dataloader\.collate_fn"):
        resolve(cfg)
