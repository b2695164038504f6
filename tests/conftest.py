"""One thread a process: results do not depend on the machine, and two test processes share two cores."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _generators_are_put_back():
    """A test that seeds leaves no trace in the next one."""
    from mmtrain.randomness import capture, restore

    state = capture()
    yield
    restore(state)
