"""Which saved values of an optimizer's groups can take the place of today's."""

import numpy as np
import pytest
import torch
from torch import nn

from mmtrain.optim.group_values import GroupValues


class Wrapped:
    """Stands for an optim wrapper."""

    def __init__(self, optimizer):
        self.optimizers = {"": optimizer}


def merged(name, value):
    """What is in the group after the merge of a checkpoint with another value."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, capturable=False)
    optimizer.param_groups[0] |= {"k": 0, "history": [], "table": {}, "nothing": None}
    values = GroupValues(model, Wrapped(optimizer))
    saved = values.state_dict()
    saved[""][0]["values"][name] = value
    values.merge(saved)
    return optimizer.param_groups[0][name]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("k", 13), ("k", 13.5), ("k", np.int64(13)), ("betas", (0.5, 0.6)), ("amsgrad", True), ("amsgrad", None),
        ("history", [1, 2, 3]), ("table", {"a": 1}), ("nothing", (1, "x")), ("foreach", False), ("weight_decay", 0),
    ],
)  # fmt: skip
def test_a_value_that_changed_while_training_is_restored(name, value):
    assert merged(name, value) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [("betas", "xy"), ("betas", (0.5,)), ("betas", (0.5, "x")), ("weight_decay", "0.1"), ("history", 3), ("k", [1])],
)
def test_a_value_of_another_kind_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"^{name} is .* in the checkpoint, and .* now$"):
        merged(name, value)
