"""Which optimizers may train a part of a parameter on its own."""

import pytest
import torch
from torch import nn

from mmtrain.errors import ConfigError
from mmtrain.optim import OptimWrapper
from mmtrain.strategies.divisible import refuse_flat_partitions


class Trained(torch.optim.Optimizer):
    """Subclasses say what is subtracted."""

    def __init__(self, params, lr=0.01, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(group["lr"] * self.update(group, parameter, parameter.grad))


class Sign(Trained):
    def update(self, group, parameter, grad):
        return grad.sign() + group["weight_decay"] * parameter


class Normed(Trained):
    """As LARS and LAMB: a trust ratio of two norms."""

    def update(self, group, parameter, grad):
        return grad * parameter.norm() / grad.norm()


class Rows(Trained):
    """As Adafactor: one scale for each row. A flat tensor is one row."""

    def update(self, group, parameter, grad):
        return grad / grad.square().mean(-1, keepdim=True).sqrt()


class DecayByNorm(Trained):
    def update(self, group, parameter, grad):
        return grad + group["weight_decay"] * parameter * parameter.norm()


class Shared(Trained):
    """As Prodigy: one number for the group, estimated from all of its parameters over the steps."""

    def step(self, closure=None):
        (group,) = self.param_groups
        group["sum"] = group.get("sum", 0.0) + sum(parameter.grad.sum().item() for parameter in group["params"])
        return super().step(closure)

    def update(self, group, parameter, grad):
        return grad * (1 + abs(group["sum"]))


class Matrices(Trained):
    def update(self, group, parameter, grad):
        if grad.dim() != 2:
            raise ValueError("only matrices")
        return torch.linalg.qr(grad)[0]


class WithClosure(Trained):
    def step(self, closure):
        closure()


def wrapper(kind, **options):
    return OptimWrapper(kind(nn.Linear(3, 3).parameters(), **options))


@pytest.mark.parametrize("kind", [Normed, Rows, DecayByNorm, Shared, Matrices, torch.optim.Adafactor])
def test_refused_on_flat_partitions(kind):
    with pytest.raises(ConfigError, match=f"{kind.__name__} does not update each element by itself.*ZeRO stage 1"):
        refuse_flat_partitions(wrapper(kind), "ZeRO stage 1")


@pytest.mark.parametrize("kind", [Sign, torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
@pytest.mark.parametrize("lr", [0.1, 0.0])
def test_elementwise_ones_are_not(kind, lr):
    refuse_flat_partitions(wrapper(kind, lr=lr), "ZeRO stage 1")


def test_one_that_cannot_be_tried_is_left_to_the_run():
    refuse_flat_partitions(wrapper(WithClosure), "ZeRO stage 1")


def test_the_trial_draws_nothing_and_leaves_the_optimizer_alone():
    wrapped = wrapper(Sign)
    before = [parameter.clone() for parameter in wrapped.param_groups[0]["params"]]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    refuse_flat_partitions(wrapped, "ZeRO stage 1")
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a, b) for a, b in zip(before, wrapped.param_groups[0]["params"], strict=True))
