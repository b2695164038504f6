"""Tensors and plain values are compared by their bits."""

import numpy as np
import pytest
import torch

from mmtrain.checkpoint.compare import MEASURED, ignored, leaves, tensor_difference, value_difference


@pytest.mark.parametrize(
    ("a", "b", "how"),
    [
        (
            torch.tensor([0.0]),
            torch.tensor([-0.0]),
            "equal values with different bits (the sign of zero) in 1 of 1 elements",
        ),
        (torch.tensor([float("nan")]), torch.tensor([float("nan")]), ""),
        (torch.tensor([float("nan"), 1]), torch.tensor([0.0, 1]), "NaN versus a number in 1 of 2 elements"),
        (torch.tensor([float("inf"), 1]), torch.tensor([float("inf"), 2]), "max abs difference 1 in 1 of 2 elements"),
        (torch.tensor([True, False]), torch.tensor([True, True]), "max abs difference 1 in 1 of 2 elements"),
        (torch.tensor(1.0), torch.tensor([1.0]), "float32 [] != float32 [1]"),
        (torch.ones(2), torch.ones(2).double(), "float32 [2] != float64 [2]"),
        (torch.empty(0), torch.empty(0), ""),
        (torch.ones(2, 2).bfloat16(), torch.ones(2, 2).bfloat16().t(), ""),
        (torch.eye(2).to_sparse(), torch.eye(2).to_sparse(), ""),
        (torch.eye(2).to_sparse(), 2 * torch.eye(2).to_sparse(), "the sparse tensors differ"),
        (torch.eye(2).to_sparse(), torch.eye(2), "sparse float32 [2, 2] != float32 [2, 2]"),
    ],
)
def test_tensors_are_compared_by_their_bits(a, b, how):
    assert tensor_difference(a, b) == how


def test_values_are_compared_by_type_and_bits():
    assert value_difference(float("nan"), float("nan")) == ""
    assert value_difference(1, 1.0) == "1 != 1.0"
    assert value_difference(True, 1) == "True != 1"
    assert value_difference(np.arange(3), np.arange(3)) == ""
    assert value_difference(np.arange(3), np.zeros(3)) == "the arrays differ"
    assert value_difference(torch.ones(2), None) == "a Tensor [2] != None"
    assert list(leaves({"a": [1, {}], "b": ()})) == [(("a", "0"), 1), (("a", "1"), {}), (("b",), ())]
    assert ignored(["save_time"], MEASURED)
    assert not ignored(["loss"], MEASURED)
