"""Lets these tests import one another's helpers, and starts a pair of processes."""

import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / name) for name in ("dist", "contract", "strategies")]


@pytest.fixture(scope="module")
def pair():
    """Two processes that run jobs together."""
    from ranks import Group

    group = Group(2)
    yield group
    group.close()
