"""Small parts that runner, contract and end-to-end tests share. A config names them with custom_imports."""

import json
import os
import random
import signal
import threading
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mmtrain.registry import DATASETS, HOOKS, MODELS


@DATASETS.register_module()
class NoisyPoints(torch.utils.data.Dataset):
    """Points whose augmentation draws from torch, numpy and random, like real ones do."""

    def __init__(self, size=44, width=6, augment=True, fails_at=None):
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(size, width, generator=generator)
        self.y = (self.x.sum(1) > 0).long()
        self.augment = augment
        self.fails_at = fails_at

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        if index == self.fails_at:
            raise ValueError("this sample is broken")
        x = self.x[index]
        if self.augment:
            x = x + 0.1 * torch.randn(x.shape) + 0.1 * float(np.random.rand()) + 0.1 * random.random()
        return {"x": x, "y": self.y[index]}


@DATASETS.register_module()
class StuckPoints(NoisyPoints):
    """Samples that take five minutes while the file ``folder/block`` exists; ``folder/blocked`` says that one is read.

    In the main process the first such sample sends ``number`` to it.
    """

    def __init__(self, folder, number=signal.SIGTERM, **options):
        super().__init__(**options)
        self.folder, self.number, self.main = Path(folder), number, os.getpid()

    def __getitem__(self, index):
        if (self.folder / "block").exists():
            first = not (self.folder / "blocked").exists()
            (self.folder / "blocked").touch()
            if first and os.getpid() == self.main:
                os.kill(self.main, self.number)
            threading.Event().wait(300)
        return super().__getitem__(index)


@HOOKS.register_module()
class BlockAt:
    """Lets `StuckPoints` block from the end of an iteration on."""

    priority = "LOWEST"

    def __init__(self, iteration, folder):
        self.iteration, self.file = iteration, Path(folder) / "block"

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.iteration and not (self.file.parent / "blocked").exists():
            self.file.touch()


@MODELS.register_module()
class Net(nn.Module):
    """A classifier with dropout and batch norm, and a frozen layer when asked for."""

    def __init__(self, width=6, hidden=8, dropout=0.3, frozen=False, nan_at=None):
        super().__init__()
        self.first = nn.Linear(width, hidden)
        self.norm = nn.BatchNorm1d(hidden)
        self.drop = nn.Dropout(dropout)
        self.last = nn.Linear(hidden, 2)
        self.first.requires_grad_(not frozen)
        self.nan_at, self.calls = nan_at, 0

    def forward(self, x, y):
        out = self.last(self.drop(torch.relu(self.norm(self.first(x)))))
        loss = nn.functional.cross_entropy(out, y)
        if self.training:
            self.calls += 1
            if self.calls == self.nan_at:
                loss = loss * float("nan")
        return {"loss": loss, "accuracy": (out.argmax(1) == y).float().mean()}


@HOOKS.register_module()
class Counter:
    """A hook with state: an exponential mean of the loss, and the number of calls."""

    priority = "NORMAL"

    def __init__(self, decay=0.9):
        self.decay, self.mean, self.calls = decay, torch.zeros(()), 0

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.calls += 1
        self.mean = self.decay * self.mean + (1 - self.decay) * outputs["loss"]
        runner.scalars.record("smooth", self.mean)

    def state_dict(self):
        return {"mean": self.mean, "calls": self.calls}

    def load_state_dict(self, state):
        self.mean, self.calls = state["mean"], state["calls"]


@HOOKS.register_module()
class Journal:
    """Records the points at which it was called, with their index."""

    priority = "LOWEST"

    def __init__(self):
        self.lines = []

    def before_run(self, runner):
        self.lines.append("before_run")

    def after_run(self, runner):
        self.lines.append("after_run")

    def before_train(self, runner):
        self.lines.append("before_train")

    def after_train(self, runner):
        self.lines.append("after_train")

    def before_train_epoch(self, runner):
        self.lines.append(f"before_train_epoch {runner.epoch}")

    def after_train_epoch(self, runner):
        self.lines.append(f"after_train_epoch {runner.epoch}")

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.lines.append(f"before_train_iter {runner.iter} {batch_idx}")

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.lines.append(f"after_train_iter {runner.iter} {batch_idx}")

    def after_val_epoch(self, runner, metrics=None):
        self.lines.append(f"after_val_epoch {runner.iter} {sorted(metrics)}")

    def after_save_checkpoint(self, runner, entry):
        self.lines.append(f"after_save_checkpoint {entry}")

    def on_exception(self, runner, error):
        self.lines.append(f"on_exception {type(error).__name__}")


def config(work_dir, **changes):
    """A small run as a plain dict; ``changes`` replace top-level keys, or merge into those that are dicts."""
    cfg = {
        "work_dir": str(work_dir),
        "model": {"type": "Net"},
        "train_dataloader": {"dataset": {"type": "NoisyPoints"}, "batch_size": 8},
        "val_dataloader": {"dataset": {"type": "NoisyPoints", "size": 20, "augment": False}, "batch_size": 8},
        "optim_wrapper": {"optimizer": {"type": "AdamW", "lr": 0.01}},
        "train_cfg": {"by_epoch": False, "max_iters": 20, "val_interval": 10},
        "param_scheduler": [{"type": "CosineAnnealingLR", "by_epoch": False}],
        "default_hooks": {
            "logger": {"type": "LoggerHook", "interval": 1},
            "progress": None,
            "checkpoint": {"type": "CheckpointHook", "interval": 7},
        },
        "randomness": {"seed": 5},
        "log_level": "WARNING",
    }
    for key, value in changes.items():
        cfg[key] = {**cfg[key], **value} if isinstance(value, dict) and isinstance(cfg.get(key), dict) else value
    return cfg


def make_runner(work_dir, **changes):
    """The runner of `config`."""
    from mmengine.config import Config

    from mmtrain.runner import FlexibleRunner

    return FlexibleRunner.from_cfg(Config(config(work_dir, **changes)))


def logged(work_dir, *names, mode="train"):
    """Step to the logged values of ``names``, over all starts in a work dir; a step that appears twice is an error."""
    found = {}
    for path in sorted(Path(work_dir).glob("*/vis_data/scalars.json")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            if record["mode"] == mode:
                assert record["step"] not in found, f"step {record['step']} is logged twice"
                found[record["step"]] = tuple(record.get(name) for name in names)
    return found


@HOOKS.register_module()
class SignalAt:
    """Sends a signal to its own process at the end of an iteration, once: the file ``marker`` records it."""

    priority = "LOWEST"

    def __init__(self, iteration, number, marker):
        self.iteration, self.number, self.marker = iteration, number, Path(marker)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.iteration and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), self.number)


@HOOKS.register_module()
class GroupSignalAt(SignalAt):
    """Sends SIGTERM to the process group, including data workers."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.iteration and not self.marker.exists():
            self.marker.touch()
            os.killpg(os.getpgid(0), signal.SIGTERM)


@HOOKS.register_module()
class Wait:
    """Stays in the first iteration until the file ``marker`` appears."""

    def __init__(self, marker):
        self.marker = Path(marker)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if not self.marker.exists():
            runner.logger.info("waiting")
        while not self.marker.exists():
            os.sched_yield()
