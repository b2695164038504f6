"""Registers the small parts; a finished run to begin from."""

import shutil

import pytest
from parts import make_runner
from starts import EVERY_7


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A work dir with the checkpoints of iterations 7, 14 and 20."""
    folder = tmp_path_factory.mktemp("trained") / "work"
    make_runner(folder, **EVERY_7).train()
    return folder


@pytest.fixture
def work(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "work")
