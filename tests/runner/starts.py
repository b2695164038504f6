"""Starts of the small run in a work dir that holds, or lacks, its checkpoints."""

import shutil

from parts import make_runner

EVERY_7 = {"default_hooks": {"checkpoint": {"type": "CheckpointHook", "interval": 7, "async_save": False}}}


def said(capfd):
    return capfd.readouterr().err


def start(work, **changes):
    runner = make_runner(work, log_level="INFO", **{**EVERY_7, **changes})
    runner.train()
    return runner


def forget(work, *names):
    for name in names:
        shutil.rmtree(work / name)
