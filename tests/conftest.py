"""One thread a process: results do not depend on the machine, and two test processes share two cores."""

import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), *(str(TESTS / name) for name in ("dist", "contract", "strategies"))]

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _generators_are_put_back():
    """Restore the generators, so that a test that seeds does not affect the next one."""
    from mmtrain.randomness import capture, restore

    state = capture()
    yield
    restore(state)


@pytest.fixture(scope="module")
def pair():
    """Two processes that run jobs together."""
    from ranks import Group

    group = Group(2)
    yield group
    group.close()
