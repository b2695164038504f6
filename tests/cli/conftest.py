"""A finished run, a copy of it, and the command in this process."""

import shutil
from pathlib import Path

import pytest
from parts import make_runner

from mmtrain.cli.checkpoint import main


@pytest.fixture(scope="module")
def hooks():
    return {
        "ema": {"type": "EMAHook", "momentum": 0.1},
        "checkpoint": {"type": "CheckpointHook", "interval": 7, "save_best": "accuracy", "rule": "greater"},
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory, hooks):
    work = tmp_path_factory.mktemp("trained") / "work"
    make_runner(work, custom_hooks=[{"type": "Counter"}], default_hooks=hooks).train()
    return work


@pytest.fixture
def work(trained, tmp_path):
    """A copy that may be damaged."""
    return Path(shutil.copytree(trained, tmp_path / "work"))


@pytest.fixture
def run(capsys):
    def command(*arguments):
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        found = capsys.readouterr()
        return status, found.out, found.err

    return command
