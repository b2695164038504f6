"""The hook that stops and kills the runs of ``verify-resume``."""

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
    """Requests a stop after iteration ``stop``, and kills all processes once after each iteration of ``kills``.

    Args:
        stop: the last iteration of the trial.
        record: an existing directory. For every start a line is appended to ``starts.jsonl`` in it, and for every kill
            an empty file ``killed_<iteration>`` is created.
        kills: iterations after which every process sends SIGKILL to itself.
    """

    priority = "LOWEST"

    def __init__(self, stop: int, record: str, *, kills: Sequence[int] = ()) -> None:
        self.stop = stop
        self.kills = tuple(kills)
        self.record = Path(record)
        self._due: set[int] = set()

    def before_train(self, runner: Any) -> None:
        """Find the kills that are still due, and record where this start begins and what may explain a difference."""
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
            runner.checkpointer.finish(runner)  # a kill during the first save would leave nothing to resume from
            dist.on_main(self._mark(done).touch)  # a collective: the mark exists before any rank dies
            os.kill(os.getpid(), signal.SIGKILL)
        if done == self.stop:
            runner.request_stop(f"the trial ends after {done} iterations")

    def _mark(self, iteration: int) -> Path:
        return self.record / f"killed_{iteration}"
