"""Cost of a training iteration: a bare PyTorch loop, mmtrain and MMEngine's Runner, interleaved in one process.

Every contender trains the same small network on the same data in batches of 32 with the same AdamW and cosine schedule,
and logs every 50 iterations. Each runs in one thread. They take turns: one runs a block of 100 iterations while the
others wait, so that changes in the machine's speed affect all of them alike. Figures are medians over blocks; the own
cost of a contender is the median of the differences to the bare loop's block in the same turn.

Usage: python benchmarks/step_overhead.py [--blocks 60]
"""

import argparse
import contextlib
import io
import statistics
import tempfile
import threading
import time
from functools import partial

import torch
from common import write_result
from torch import nn

BATCH, WIDTH, BLOCK = 32, 64, 100


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


class Turns:
    """Lets the threads run one at a time, each for a block of iterations."""

    def __init__(self, names):
        self.waiting = {name: threading.Semaphore(0) for name in names}
        self.order = list(names)
        self.times = {name: [] for name in names}
        self.failed = None

    def tick(self, name, done):
        """Called by contender ``name`` at the end of every iteration."""
        if done % BLOCK:
            return
        now = time.perf_counter()
        if done > BLOCK:  # the first block warms up
            self.times[name].append((now - self.begun) / BLOCK * 1e6)
        self.hand_over(name)
        self.waiting[name].acquire()
        self.begun = time.perf_counter()

    def hand_over(self, name):
        following = self.order[(self.order.index(name) + 1) % len(self.order)]
        self.waiting[following].release()

    def run(self, contenders, iters):
        """Run all contenders to their end and return their times."""

        def body(name, function):
            self.waiting[name].acquire()
            self.begun = time.perf_counter()
            try:
                function(iters, lambda done: self.tick(name, done))
            except BaseException as error:
                self.failed = error
            self.hand_over(name)

        threads = [threading.Thread(target=body, args=item) for item in contenders.items()]
        for thread in threads:
            thread.start()
        self.waiting[self.order[0]].release()
        for thread in threads:
            thread.join()
        if self.failed is not None:
            raise self.failed
        return self.times


def bare(iters, tick, *, fused):
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iters)
    loader = torch.utils.data.DataLoader(Samples(BATCH * iters), batch_size=BATCH, shuffle=True, drop_last=True)
    for done, (x, y) in enumerate(loader, 1):
        loss = model(x, y)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if done % 50 == 0:
            print(done, loss.item(), schedule.get_last_lr())
        tick(done)


def mmtrain_runner(iters, tick, *, fused, per_sample):
    from mmengine.config import Config

    from mmtrain.hooks import Hook
    from mmtrain.runner import FlexibleRunner

    class Ticks(Hook):
        priority = "LOWEST"

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            tick(runner.iter + 1)

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
                        "checkpoint": {"interval": -1, "save_last": False},
                    },
                    "custom_hooks": [Ticks()],
                    "randomness": {"seed": 0, "per_sample": per_sample},
                }
            )
        )
        runner.train()


def mmengine_runner(iters, tick):
    import mmengine.hooks
    import mmengine.model
    import mmengine.runner

    class Wrapped(mmengine.model.BaseModel):
        def __init__(self):
            super().__init__()
            self.inner = Classifier()

        def forward(self, x, y, mode="loss"):
            return self.inner(x, y)

    class Ticks(mmengine.hooks.Hook):
        priority = "LOWEST"

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            tick(runner.iter + 1)

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


CONTENDERS = {
    "bare": partial(bare, fused=False),
    "bare, fused": partial(bare, fused=True),
    "mmtrain, per batch": partial(mmtrain_runner, fused=True, per_sample=False),
    "mmtrain, per sample": partial(mmtrain_runner, fused=True, per_sample=True),
    "mmengine Runner": mmengine_runner,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=60)
    iters = (parser.parse_args().blocks + 1) * BLOCK
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        times = Turns(CONTENDERS).run(CONTENDERS, iters)
    medians = {name: statistics.median(values) for name, values in times.items()}
    base = times["bare, fused"]
    own = {name: statistics.median(a - b for a, b in zip(values, base, strict=False)) for name, values in times.items()}
    print(f"{'':24}{'us/iteration':>14}{'x bare fused':>14}{'own cost, us':>14}")
    for name, value in medians.items():
        print(f"{name:24}{value:14.1f}{value / medians['bare, fused']:14.3f}{own[name]:14.1f}")
    figures = {
        "iterations": iters,
        "microseconds": medians,
        "own_cost_microseconds": own,
        "per_sample_microseconds": (own["mmtrain, per sample"] - own["mmtrain, per batch"]) / BATCH,
    }
    print(f"seeding every sample: {figures['per_sample_microseconds']:.1f} us per sample")
    print(f"written to {write_result('step_overhead', figures)}")


if __name__ == "__main__":
    main()
