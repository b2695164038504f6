"""The optimizer's state by parameter name: what a checkpoint can hold, and what it gives back."""

import pytest
import torch
from torch import nn

from mmtrain.errors import ConfigError
from mmtrain.optim import OptimWrapper, OptimWrapperDict
from mmtrain.strategies.state_dict import load_optimizer_tensors, optimizer_tensors


class Scaled(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, dtype=dtype))
        self.scale = nn.Parameter(torch.ones((), dtype=dtype))

    def forward(self):
        return (self.weight * self.scale - 2).square().sum()


def stepped(model, optimizer, times=2):
    def closure():
        optimizer.zero_grad()
        loss = model()
        loss.backward()
        return loss

    for _ in range(times):
        optimizer.step(closure)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adagrad, torch.optim.Adafactor, torch.optim.NAdam])
def test_a_restored_optimizer_continues_identically(kind, dtype):
    """Also for a scalar parameter of type float64, whose moments look like numbers."""
    model, other = Scaled(dtype), Scaled(dtype)
    optimizer, restored = kind(model.parameters(), lr=0.1), kind(other.parameters(), lr=0.1)
    stepped(model, optimizer)
    other.load_state_dict(model.state_dict())
    tensors = {name: value.clone() for name, value in optimizer_tensors(model, OptimWrapper(optimizer)).items()}
    load_optimizer_tensors(other, OptimWrapper(restored), tensors)
    stepped(model, optimizer)
    stepped(other, restored)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(model.parameters(), other.parameters(), strict=True))


def test_state_that_is_not_a_tensor_is_refused_with_the_remedy():
    model = Scaled()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    stepped(model, optimizer)
    with pytest.raises(ConfigError, match=r"LBFGS keeps a list as '\w+' of weight.*save_optimizer=False"):
        optimizer_tensors(model, OptimWrapper(optimizer))


def test_a_parameter_of_two_optimizers_is_refused():
    model = Scaled()
    pair = {name: OptimWrapper(torch.optim.SGD([model.weight], lr=0.1)) for name in ("one", "two")}
    with pytest.raises(ConfigError, match="weight is trained by two optimizers"):
        optimizer_tensors(model, OptimWrapperDict(**pair))
