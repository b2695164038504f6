"""Helpers of the resume tests: start the small run in a work dir, delete its checkpoints, read its output."""

import shutil

from parts import make_runner

EVERY_7 = {"default_hooks": {"checkpoint": {"type": "CheckpointHook", "interval": 7, "async_save": False}}}


def printed(capfd):
    return capfd.readouterr().err


def start(work, **changes):
    runner = make_runner(work, log_level="INFO", **{**EVERY_7, **changes})
    runner.train()
    return runner


def delete_checkpoints(work, *names):
    for name in names:
        shutil.rmtree(work / name)
