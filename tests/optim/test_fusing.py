"""When torch's fused kernels are used."""

import copy

import pytest
import torch
from torch import nn

from mmtrain.errors import ConfigError
from mmtrain.optim import build_optim_wrapper


def build(model, **optimizer):
    return build_optim_wrapper(model, dict(optimizer={"lr": 0.1, **optimizer}))


def conv(layout):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(54, 5))
    if layout == "channels_last":
        model.to(memory_format=torch.channels_last)
    if layout == "transposed":
        model[2].weight = nn.Parameter(model[2].weight.detach().t().contiguous().t())
    if layout == "sliced":
        model[2].weight = nn.Parameter(torch.randn(5, 108)[:, ::2])
    return model


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_dense_parameters_of_any_stride_order_are_fused(layout):
    assert build(conv(layout), type="AdamW").param_groups[0]["fused"]


def test_parameters_with_gaps_are_not_and_a_line_says_so():
    wrapper = build(conv("sliced"), type="AdamW")
    assert not wrapper.param_groups[0]["fused"]
    (notice,) = wrapper.notices
    assert "AdamW runs without torch's fused kernel" in notice
    assert "2.weight" in notice


def test_parameters_with_gaps_train_as_dense_ones():
    sliced = conv("sliced")
    dense = copy.deepcopy(sliced)
    dense[2].weight = nn.Parameter(dense[2].weight.detach().contiguous())
    for model, options in ((sliced, {}), (dense, {"fused": False})):
        wrapper = build(model, type="AdamW", **options)
        for _ in range(3):
            model(torch.ones(2, 4, 5, 5)).square().sum().backward()
            wrapper.finish_window()
    torch.testing.assert_close(sliced[2].weight, dense[2].weight)


def test_asking_for_what_the_kernel_does_not_take_is_an_error():
    with pytest.raises(ConfigError, match=r"optimizer.fused.*no fused AdamW for parameters with gaps.*2.weight"):
        build(conv("sliced"), type="AdamW", fused=True)


@pytest.mark.parametrize("kind", ["AdamW", "Adagrad", "NAdam"])
def test_parameters_whose_elements_share_memory_are_refused(kind):
    model = nn.Linear(3, 2)
    model.bias = nn.Parameter(torch.zeros(1).expand(2))
    with pytest.raises(ConfigError, match=r"elements of bias share memory \(it was made by expand\(\)\)"):
        build(model, type=kind)


class Branches(nn.Module):
    """The second layer is used from the third call on, the third one never."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
        self.calls = 0

    def forward(self):
        self.calls += 1
        out = self.layers[0](torch.ones(2, 3))
        return (self.layers[1](out) if self.calls > 2 else out).square().sum()


@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"weight_decay": 0.1}, {"maximize": True}])
def test_a_late_parameter_trains_under_fused_sgd_as_under_an_unfused_one(options):
    found = []
    for fused in (None, False):
        model = Branches()
        wrapper = build(model, type="SGD", momentum=0.9, fused=fused, **options)
        assert bool(wrapper.param_groups[0]["fused"]) is (fused is None)
        for _ in range(6):
            model().mul(0.01).backward()
            wrapper.finish_window()
        found.append([parameter.detach() for parameter in model.parameters()])
        assert model.layers[2].weight not in wrapper.optimizer.state
    for fused, unfused in zip(*found, strict=True):
        torch.testing.assert_close(fused, unfused, rtol=1e-6, atol=1e-7)


def test_sgd_with_dampening_is_not_fused():
    """Its first step has none, which a buffer of zeros cannot give."""
    assert not build(Branches(), type="SGD", momentum=0.9, dampening=0.1).param_groups[0]["fused"]
