"""How many samples a batch holds."""

from collections.abc import Mapping
from typing import Any

import torch


def count_samples(batch: Any) -> int:
    """Return the number of samples in a collated batch: the first dimension of its first tensor.

    The first tensor is looked for in mappings and sequences, depth first. Without any it is the length of the innermost
    first sequence, at least 1.
    """
    if isinstance(batch, torch.Tensor):
        return batch.shape[0] if batch.ndim else 1
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, list | tuple):
        for value in batch:
            if isinstance(value, torch.Tensor | Mapping | list | tuple):
                return count_samples(value)
        return max(1, len(batch))
    return 1
