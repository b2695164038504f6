"""Hooks that trouble one rank."""

import os
import signal
import time
from pathlib import Path

import parts  # noqa: F401

from mmtrain.errors import RunError
from mmtrain.registry import HOOKS


@HOOKS.register_module()
class Trouble:
    """At the end of an iteration, on one rank: raise, raise an MMTrainError, send itself a signal, or hang.

    Happens once in the life of the file ``marker``, where one is given.
    """

    priority = "LOWEST"

    def __init__(self, kind, rank, iteration, marker=None):
        self.kind, self.rank, self.iteration = kind, rank, iteration
        self.marker = Path(marker) if marker else None

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.rank != self.rank or runner.iter + 1 != self.iteration:
            return
        if self.marker is not None:
            if self.marker.exists():
                return
            self.marker.touch()
        if self.kind == "raise":
            raise ValueError("the sample is broken")
        if self.kind == "refuse":
            raise RunError("the sample is refused")
        if self.kind == "hang":
            time.sleep(600)
        os.kill(os.getpid(), getattr(signal, self.kind))
