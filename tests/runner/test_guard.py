"""The first NaN or Inf loss is named."""

import pytest
import torch

from mmtrain.errors import RunError
from mmtrain.runner.guard import NonfiniteGuard


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_cpu_tells_at_once(value):
    guard = NonfiniteGuard("stop", torch.device("cpu"))
    guard.observe(6, torch.tensor(1.0))
    with pytest.raises(RunError, match=f"iteration 7 is {value}"):
        guard.observe(7, torch.tensor(value))


def test_an_accelerator_tells_at_the_check_and_names_the_first():
    guard = NonfiniteGuard("stop", torch.device("cuda"))
    for iteration, value in enumerate([1.0, 2.0, float("nan"), float("inf")], 1):
        guard.observe(iteration, torch.tensor(value, dtype=torch.bfloat16))
    with pytest.raises(RunError, match="iteration 3 is nan"):
        guard.check()
    guard.check()  # told once


def test_skip_leaves_it_to_the_optimizer():
    guard = NonfiniteGuard("skip", torch.device("cpu"))
    guard.observe(1, torch.tensor(float("nan")))
    guard.check()
