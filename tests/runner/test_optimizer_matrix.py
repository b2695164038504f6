"""Every optimizer of torch with parameters of every memory layout, over a crash and a resume.

The full product runs with ``pytest -m slow``.
"""

import itertools

import pytest
import torch
from exactness import assert_exact
from torch import nn
from torch_optimizers import OPTIMIZERS

from mmtrain.registry import MODELS

LAYOUTS = ("contiguous", "channels_last", "transposed")
CASES = [
    pytest.param(kind, layout, marks=() if (number + shift) % 3 == 0 else pytest.mark.slow)
    for number, kind in enumerate(OPTIMIZERS)
    for shift, layout in enumerate(LAYOUTS)
]


@MODELS.register_module()
class LayoutNet(nn.Module):
    """A convolution and a linear layer, whose weights have the strides that ``layout`` says; a branch used later."""

    def __init__(self, layout, only_matrices=False):
        super().__init__()
        self.conv = nn.Identity() if only_matrices else nn.Conv2d(6, 4, 2)
        self.last = nn.Linear(6 * 9 if only_matrices else 4 * 4, 2, bias=not only_matrices)
        self.late = nn.Linear(2, 2, bias=not only_matrices)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        if layout == "channels_last":
            self.to(memory_format=torch.channels_last)
        if layout == "transposed":
            for linear in (self.last, self.late):
                linear.weight = nn.Parameter(linear.weight.detach().t().contiguous().t())

    def forward(self, x, y):
        image = x[:, :, None, None].expand(-1, -1, 3, 3) * torch.linspace(0.5, 1.5, 9).view(3, 3)
        out = self.last(self.conv(image).flatten(1))
        if self.training:
            self.calls += 1
        if self.calls > 9:
            out = out + self.late(out)
        return {"loss": nn.functional.cross_entropy(out, y), "accuracy": (out.argmax(1) == y).float().mean()}


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_exact_over_a_crash(tmp_path, kind, layout):
    """The crashes are before and after the iteration from which the late branch is used."""
    assert_exact(
        tmp_path,
        crashes=[("iteration", 6), ("iteration", 16)],
        model={"type": "LayoutNet", "layout": layout, "only_matrices": kind == "Muon"},
        optim_wrapper={"optimizer": {"type": kind, "lr": 0.01, **OPTIMIZERS[kind]}},
        val_dataloader=None,
        val_evaluator=None,
        val_cfg=None,
    )


def test_the_matrix_is_torchs_list():
    """A new optimizer of torch must be tried. Two cannot: LBFGS needs a closure, SparseAdam sparse gradients."""
    known = {
        name
        for name, cls in vars(torch.optim).items()
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
    }
    assert known - {"LBFGS", "SparseAdam"} == set(OPTIMIZERS)
    assert len(CASES) == len(list(itertools.product(OPTIMIZERS, LAYOUTS)))
