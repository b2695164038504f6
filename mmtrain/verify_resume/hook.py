"""The hook that stops, and kills, the runs of `verify-resume`."""

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmtrain import dist
from mmtrain.hooks.base import Hook
from mmtrain.registry import HOOKS

STARTS = "starts.jsonl"


@HOOKS.register_module()
class ResumeTrialHook(Hook):
    """Asks for a stop after ``stop`` iterations; kills all processes at each iteration of ``kills``, once.

    ``record`` is a directory for the marks of kills that have happened and for a line about every start.
    """

    priority = "LOWEST"

    def __init__(self, stop: int, record: str, *, kills: Sequence[int] = ()) -> None:
        self.stop = stop
        self.kills = tuple(kills)
        self.record = Path(record)
        self._due: set[int] = set()

    def before_train(self, runner: Any) -> None:
        """Note where this start begins, which kills are still due, and what the verdict has to know of the run."""
        self._due = dist.on_main(lambda: {kill for kill in self.kills if not self._mark(kill).exists()})
        if not dist.is_main():
            return
        facts = {
            "iteration": runner.progress.iteration,
            "device": runner.device.type,
            "deterministic": runner.randomness.deterministic,
            "positional": runner.randomness.positional,
            "per_sample": runner.randomness.per_sample,
        }
        with (self.record / STARTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        done = runner.progress.iteration
        if done in self._due:
            runner.checkpointer.finish(runner)  # a kill inside a save may leave nothing to resume, and prove little
            dist.on_main(self._mark(done).touch)  # when rank 0 has finished, it stands
            os.kill(os.getpid(), signal.SIGKILL)
        if done == self.stop:
            runner.request_stop(f"the trial ends after {done} iterations")

    def _mark(self, iteration: int) -> Path:
        return self.record / f"killed_{iteration}"
