"""Evaluation mode for a while, with every module's mode restored afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Set ``module`` to evaluation mode; afterwards each of its modules is in the mode it was in.

    ``module.train()`` alone would also switch modules that were in evaluation mode during training, such as frozen
    batch norms.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
