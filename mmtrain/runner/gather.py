"""The weights of the full model, gathered on rank 0."""

from torch import Tensor

from mmtrain import dist
from mmtrain.dtensor import full_tensor
from mmtrain.strategies import Strategy


def gather_weights(strategy: Strategy) -> dict[str, Tensor]:
    """The full model's tensors by name, on rank 0 (where sharded on the CPU, one at a time); empty elsewhere."""
    weights = {}
    for name, value in strategy.model_state().items():
        gathered = full_tensor(value)
        if dist.is_main():
            weights[name] = gathered if gathered is value else gathered.cpu()
    return weights
