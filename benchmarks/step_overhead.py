"""What a training iteration costs: a bare PyTorch loop, mmtrain and MMEngine's Runner, interleaved in one process.

Every contender trains the same small network on the same data in batches of 32 with the same AdamW, logging every 50
iterations, cosine schedule. Rounds alternate, so drift of the machine meets all of them alike; figures are medians
over rounds of the mean time of one iteration in a round.

Usage: python benchmarks/step_overhead.py [--rounds 7] [--iters 2000]
"""

import argparse
import contextlib
import io
import json
import logging
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import write_result
from torch import nn

BATCH, WIDTH, WARM = 32, 64, 200


class Samples(torch.utils.data.Dataset):
    def __init__(self, length):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(4096, WIDTH, generator=generator)
        self.y = torch.randint(0, 10, (4096,), generator=generator)
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return self.x[index % 4096], self.y[index % 4096]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x, y):
        return {"loss": nn.functional.cross_entropy(self.net(x), y)}


class Clock:
    """Times the iterations from WARM to the end."""

    def __init__(self, iters):
        self.iters = iters

    def tick(self, done):
        if done == WARM:
            self.start = time.perf_counter()
        elif done == self.iters:
            self.result = (time.perf_counter() - self.start) / (self.iters - WARM) * 1e6


def bare(iters, *, fused):
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iters)
    loader = torch.utils.data.DataLoader(Samples(BATCH * iters), batch_size=BATCH, shuffle=True, drop_last=True)
    clock = Clock(iters)
    for done, (x, y) in enumerate(loader, 1):
        loss = model(x, y)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if done % 50 == 0:
            print(done, loss.item(), schedule.get_last_lr())
        clock.tick(done)
    return clock.result


def mmtrain_runner(iters, *, fused, per_sample):
    from mmengine.config import Config

    from mmtrain.hooks import Hook
    from mmtrain.runner import FlexibleRunner

    clock = Clock(iters)

    class Ticks(Hook):
        priority = "LOWEST"

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            clock.tick(runner.iter + 1)

    with tempfile.TemporaryDirectory() as folder:
        runner = FlexibleRunner.from_cfg(
            Config(
                {
                    "model": Classifier(),
                    "work_dir": folder,
                    "train_dataloader": {"dataset": Samples(BATCH * iters), "batch_size": BATCH, "shuffle": True},
                    "train_cfg": {"by_epoch": False, "max_iters": iters},
                    "optim_wrapper": {"optimizer": {"type": "AdamW", "lr": 1e-3, "fused": fused}},
                    "param_scheduler": {"type": "CosineAnnealingLR", "by_epoch": False},
                    "default_hooks": {
                        "logger": {"type": "LoggerHook", "interval": 50},
                        "checkpoint": {"save_last": False},
                    },
                    "custom_hooks": [Ticks()],
                    "randomness": {"seed": 0, "per_sample": per_sample},
                }
            )
        )
        runner.train()
    return clock.result


def mmengine_runner(iters):
    import mmengine.hooks
    import mmengine.model
    import mmengine.runner

    clock = Clock(iters)

    class Wrapped(mmengine.model.BaseModel):
        def __init__(self):
            super().__init__()
            self.inner = Classifier()

        def forward(self, x, y, mode="loss"):
            return self.inner(x, y)

    class Ticks(mmengine.hooks.Hook):
        priority = "LOWEST"

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            clock.tick(runner.iter + 1)

    with tempfile.TemporaryDirectory() as folder:
        mmengine.runner.Runner(
            model=Wrapped(),
            work_dir=folder,
            train_dataloader={
                "dataset": Samples(BATCH * iters),
                "batch_size": BATCH,
                "sampler": {"type": "DefaultSampler", "shuffle": True},
                "collate_fn": {"type": "default_collate"},
            },
            train_cfg={"by_epoch": True, "max_epochs": 1},
            optim_wrapper={"optimizer": {"type": "AdamW", "lr": 1e-3}},
            param_scheduler={"type": "CosineAnnealingLR", "T_max": iters, "by_epoch": False},
            default_hooks={"logger": {"type": "LoggerHook", "interval": 50}, "checkpoint": None},
            custom_hooks=[Ticks()],
            log_processor={"by_epoch": False},
            experiment_name=f"bench{time.time()}",
        ).train()
    return clock.result


CONTENDERS = {
    "bare": lambda iters: bare(iters, fused=False),
    "bare, fused": lambda iters: bare(iters, fused=True),
    "mmtrain, per batch": lambda iters: mmtrain_runner(iters, fused=True, per_sample=False),
    "mmtrain, per sample": lambda iters: mmtrain_runner(iters, fused=True, per_sample=True),
    "mmengine Runner": mmengine_runner,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--iters", type=int, default=2000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    times = {name: [] for name in CONTENDERS}
    for number in range(arguments.rounds):
        for name, run in CONTENDERS.items():
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                times[name].append(run(arguments.iters))
            logging.shutdown()
        print(
            f"round {number + 1}: " + ", ".join(f"{name} {values[-1]:.0f}" for name, values in times.items()),
            flush=True,
        )
    medians = {name: statistics.median(values) for name, values in times.items()}
    base = medians["bare, fused"]
    # Paired differences within a round: drift of the machine between rounds cancels.
    own = {
        name: statistics.median(a - b for a, b in zip(values, times["bare, fused"], strict=True))
        for name, values in times.items()
    }
    print(f"\n{'':24}{'us/iteration':>14}{'x bare fused':>14}{'own cost, us':>14}")
    for name, value in medians.items():
        print(f"{name:24}{value:14.1f}{value / base:14.3f}{own[name]:14.1f}")
    path = write_result(
        "step_overhead",
        {
            "iterations": arguments.iters,
            "rounds": arguments.rounds,
            "microseconds": medians,
            "own_cost_microseconds": own,
            "per_sample_microseconds": (medians["mmtrain, per sample"] - medians["mmtrain, per batch"]) / BATCH,
            "all_rounds": times,
        },
    )
    print(f"\nwritten to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    return json.dumps(medians)


if __name__ == "__main__":
    main()
