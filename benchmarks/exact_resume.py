"""Are the losses after a resume in the middle of an epoch those of the uninterrupted run?

README.md compares other frameworks on this experiment: 60 iterations of a small network with dropout 0.3, shuffling,
and augmentation that draws from torch, numpy and random in 2 workers; an epoch has 40 iterations. Run A is not
interrupted. Run B is killed with SIGKILL at the end of iteration 30, just after a checkpoint, and started again in a
new process. Usage: python benchmarks/exact_resume.py
"""

import json
import multiprocessing
import os
import random
import signal
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import write_result
from torch import nn


class Points(torch.utils.data.Dataset):
    def __init__(self):
        self.x = torch.randn(320, 16, generator=torch.Generator().manual_seed(0))
        self.y = (self.x.sum(1) > 0).long()

    def __len__(self):
        return 320

    def __getitem__(self, index):
        x = self.x[index] + 0.1 * torch.randn(16) + float(np.random.rand()) * 0.1 + random.random() * 0.1
        return {"x": x, "labels": self.y[index]}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 2))

    def forward(self, x, labels):
        return {"loss": nn.functional.cross_entropy(self.layers(x), labels)}


class Kill:
    """Kills its process at the end of iteration 30, once the checkpoint is complete."""

    def after_save_checkpoint(self, runner, entry):
        if entry == "iter_30.pth":
            os.kill(os.getpid(), signal.SIGKILL)


def run(work_dir, kill):
    from mmengine.config import Config

    from mmtrain.runner import FlexibleRunner

    torch.set_num_threads(1)
    torch.manual_seed(5)  # the config's seed is set after this model is built
    cfg = {
        "model": Net(),
        "work_dir": work_dir,
        "train_dataloader": {"dataset": Points(), "batch_size": 8, "num_workers": 2},
        "train_cfg": {"by_epoch": False, "max_iters": 60},
        "optim_wrapper": {"optimizer": {"type": "AdamW", "lr": 1e-2}},
        "default_hooks": {
            "logger": {"type": "LoggerHook", "interval": 1},
            "checkpoint": {"type": "CheckpointHook", "interval": 30, "async_save": False},
        },
        "custom_hooks": [Kill()] if kill else [],
        "randomness": {"seed": 1},
        "resume": True,
        "log_level": "ERROR",
    }
    FlexibleRunner.from_cfg(Config(cfg)).train()


def losses(work_dir):
    found = {}
    for path in Path(work_dir).glob("*/vis_data/scalars.json"):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            if record["mode"] == "train":
                found[record["step"]] = record["loss"]
    return found


def process(work_dir, kill=False):
    child = multiprocessing.get_context("spawn").Process(target=run, args=(work_dir, kill))
    child.start()
    child.join()
    return child.exitcode


def main():
    with tempfile.TemporaryDirectory() as folder:
        uninterrupted, killed = f"{folder}/uninterrupted", f"{folder}/killed"
        assert process(uninterrupted) == 0
        assert process(killed, kill=True) == -signal.SIGKILL
        assert process(killed) == 0
        a, b = losses(uninterrupted), losses(killed)
    assert sorted(a) == sorted(b) == list(range(1, 61))
    before = sum(a[step] == b[step] for step in range(1, 31))
    after = sum(a[step] == b[step] for step in range(31, 61))
    print(f"identical before the kill: {before} of 30, after the resume: {after} of 30")
    write_result("exact_resume", {"identical_before": before, "identical_after": after, "of": 30})


if __name__ == "__main__":
    main()
