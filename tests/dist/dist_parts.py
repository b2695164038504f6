"""Hooks and other parts that fail or hang on one rank."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import parts
import strategy_parts
import torch
from mmengine.evaluator import BaseMetric
from strategy_parts import Tokens
from torch import nn

from mmtrain import dist, launch
from mmtrain.errors import RunError
from mmtrain.registry import DATASETS, HOOKS, METRICS, MODELS


@HOOKS.register_module()
class FailOrHang:
    """At the end of an iteration, on one rank: raise, exit, send itself a signal, hang, or end torchrun.

    ``kind`` may also be "refuse" (an MMTrainError), "sys.exit", "sys.exit CODE", "os._exit" or "interrupt".

    Happens only once if a file ``marker`` is given, which records it.
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
        if self.kind.startswith("sys.exit"):
            sys.exit(int(self.kind.split()[1]) if " " in self.kind else "the sample is odd")
        if self.kind == "os._exit":
            os._exit(3)
        if self.kind == "interrupt":
            raise KeyboardInterrupt
        if self.kind == "kill the agent":
            os.kill(os.getppid(), signal.SIGKILL)
        if self.kind in ("hang", "kill the agent"):
            time.sleep(600)
        os.kill(os.getpid(), getattr(signal, self.kind))


@HOOKS.register_module()
class BrokenState:
    """Its state cannot be had on one rank, from the first save on: ``kind`` is what is raised."""

    priority = "NORMAL"

    def __init__(self, rank, kind="ValueError"):
        self.rank, self.kind = rank, kind

    def state_dict(self):
        if dist.rank() == self.rank:
            if self.kind == "exit":
                sys.exit(3)
            raise {"ValueError": ValueError, "KeyboardInterrupt": KeyboardInterrupt}[self.kind]("no state")
        return {}

    def load_state_dict(self, state):
        pass


class _BrokenModule(nn.Module):
    def __init__(self, rank):
        super().__init__()
        self.rank = rank

    def get_extra_state(self):
        if dist.rank() == self.rank:
            raise ValueError("no extra state")
        return {}

    def set_extra_state(self, state):
        pass


@MODELS.register_module()
class BrokenExtraState(strategy_parts.TinyLanguageModel):
    """Holds a module whose extra state cannot be had on one rank."""

    def __init__(self, rank, **kwargs):
        super().__init__(**kwargs)
        self.broken = _BrokenModule(rank)


@METRICS.register_module()
class BrokenMetric(BaseMetric):
    """``where`` it raises on one rank: "process", "evaluate" (before its collective), or "compute" (rank 0 alone)."""

    def __init__(self, rank, where):
        super().__init__()
        self.rank, self.where = rank, where

    def process(self, data_batch, data_samples):
        if self.where == "process" and dist.rank() == self.rank:
            raise ValueError("no boxes")
        cannot_be_sent = self.where == "evaluate" and dist.rank() == self.rank
        self.results.append(threading.Lock() if cannot_be_sent else 0)

    def compute_metrics(self, results):
        if self.where == "compute":
            raise ValueError("no boxes")
        return {"seen": len(results)}


def restart_watchdog(seconds, position=None):
    """Set how many seconds without progress the watchdog of this process allows."""
    launch.end_watch()
    launch.watch(seconds, position)


@HOOKS.register_module()
class ShortTimeout:
    """Shortens ``env_cfg.timeout`` after the first iteration: on a loaded machine, starting takes any time."""

    priority = "NORMAL"

    def __init__(self, seconds):
        self.seconds = seconds

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == 0:
            restart_watchdog(self.seconds, lambda: runner.progress.iteration)


@DATASETS.register_module()
class HangingTokens(Tokens):
    """One rank's sample never comes."""

    def __init__(self, rank, index, **kwargs):
        super().__init__(**kwargs)
        self.rank, self.index = rank, index

    def __getitem__(self, index):
        if index == self.index and int(os.environ.get("RANK", "0")) == self.rank:
            self.wait_for_the_disk()
        return super().__getitem__(index)

    def wait_for_the_disk(self):
        time.sleep(600)


@DATASETS.register_module()
class SlowTokens(Tokens):
    """Every sample takes its time."""

    def __init__(self, seconds, **kwargs):
        super().__init__(**kwargs)
        self.seconds = seconds

    def __getitem__(self, index):
        time.sleep(self.seconds)
        return super().__getitem__(index)


@HOOKS.register_module()
class HangWhenBuilt:
    """Its constructor never returns on one rank."""

    def __init__(self, rank):
        restart_watchdog(4)
        if int(os.environ["RANK"]) == rank:
            time.sleep(600)


@HOOKS.register_module()
class HoldAt:
    """Stays at the end of an iteration, on rank 0, until the file ``marker`` appears; says "holding" first."""

    priority = "LOWEST"

    def __init__(self, iteration, marker):
        self.iteration, self.marker = iteration, Path(marker)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.rank == 0 and runner.iter + 1 == self.iteration and not self.marker.exists():
            runner.logger.info("holding")
            while not self.marker.exists():
                os.sched_yield()


def collective_limits(work_dir):
    """The limits in seconds of all process groups of a run. A job of a pair."""
    found = []

    class Look:
        priority = "NORMAL"

        def before_train(self, runner):
            for ranks in torch.distributed.distributed_c10d._world.pg_map:
                backend = ranks._get_backend(torch.device("cpu"))
                found.append(backend.options._timeout.total_seconds())

    parts.make_runner(work_dir, custom_hooks=[Look()], **strategy_parts.changes(2, iterations=2)).train()
    return found
