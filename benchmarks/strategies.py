"""What mmtrain adds to an iteration under DDP, FSDP2 and DeepSpeed, compared with a bare loop on the same wrapper.

For each engine, torchrun starts a group of processes. In every process two threads train the same GPT on the same kind
of data, one with a typical loop around the bare wrapper, one with mmtrain's FlexibleRunner. They take turns in blocks
of iterations (as in step_overhead.py), in the same order on all ranks, so that changes in the machine's speed affect
both alike. The ratio is the median over turns of mmtrain's block to the bare loop's block in the same turn.
Target: at most 1.02.

With a GPU (one is enough: ``--processes 1``) the backend is nccl.

Usage: python benchmarks/strategies.py [--blocks 30] [--processes 2] [--engines ddp fsdp zero1 zero2 zero3]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import step_overhead
import torch
from common import RESULTS, commit, write_result

ROOT = Path(__file__).resolve().parent.parent
ENGINES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
BATCH, CONTEXT, VOCABULARY, BLOCK = 4, 128, 512, 10
MODEL = {"layers": 4, "heads": 4, "width": 256}
OPTIMIZER = {"lr": 1e-3, "fused": True}
TARGET = 1.02


class Tokens(torch.utils.data.Dataset):
    """Random tokens; their values do not matter here."""

    def __init__(self, length):
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(0, VOCABULARY, (1024, CONTEXT + 1), generator=generator)
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        row = self.tokens[index % 1024]
        return {"input_ids": row[:-1], "labels": row[1:]}


def network():
    from mmtrain.models import GPT

    torch.manual_seed(0)
    model = GPT(VOCABULARY, CONTEXT, **MODEL)
    model.init_weights()
    return model


def zero_config(engine):
    return {"stage": int(engine[-1])}


# ---- the bare loops
def wrapped(engine, device):
    """The model in the bare wrapper, and a function that does backward and the optimizer step."""
    model = network().to(device)
    if engine == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)
    elif engine == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIMIZER)
    if not engine.startswith("zero"):

        def step(loss):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return model, step
    from mmtrain.strategies.zero import library

    config = {
        "train_micro_batch_size_per_gpu": BATCH, "gradient_accumulation_steps": 1, "steps_per_print": 1 << 40,
        "zero_optimization": zero_config(engine), "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip
    deepspeed = library.load()
    with library.quiet():
        module, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)

    def step_engine(loss):
        module.backward(loss)
        module.step()

    return module, step_engine


def bare(engine, device, iters, tick):
    module, step = wrapped(engine, device)
    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    data = Tokens(BATCH * ranks * iters)
    sampler = torch.utils.data.DistributedSampler(data, ranks, rank)
    loader = torch.utils.data.DataLoader(data, batch_size=BATCH, sampler=sampler)
    for done, batch in enumerate(loader, 1):
        loss = module(**{name: value.to(device) for name, value in batch.items()})["loss"]
        step(loss)
        if done % 50 == 0:
            print(done, loss.item())
        tick(done)


# ---- mmtrain
def strategy_of(engine):
    if engine == "ddp":
        return {"type": "DDPStrategy"}
    if engine == "fsdp":
        return {"type": "FSDPStrategy", "wrap": ["Block"]}
    return {"type": "DeepSpeedStrategy", "zero_optimization": zero_config(engine)}


def with_mmtrain(engine, folder, iters, tick):
    from mmengine.config import Config

    from mmtrain.hooks import Hook
    from mmtrain.runner import FlexibleRunner

    class Ticks(Hook):
        priority = "LOWEST"

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            tick(runner.iter + 1)

    ranks = torch.distributed.get_world_size()
    runner = FlexibleRunner.from_cfg(
        Config(
            {
                "model": network(),
                "work_dir": folder,
                "strategy": strategy_of(engine),
                "train_dataloader": {"dataset": Tokens(BATCH * ranks * iters), "batch_size": BATCH, "shuffle": True},
                "train_cfg": {"by_epoch": False, "max_iters": iters},
                "optim_wrapper": {"optimizer": {"type": "AdamW", **OPTIMIZER}},
                "default_hooks": {
                    "logger": {"type": "LoggerHook", "interval": 50},
                    "checkpoint": {"interval": -1, "save_last": False},
                    "progress": None,
                },
                "custom_hooks": [Ticks()],
                "randomness": {"seed": 0},
                "log_level": "WARNING",
            }
        )
    )
    runner.train()


def measure(engine, folder, blocks):
    """Measure in every process of the group; rank 0 writes the times of both contenders."""
    from mmtrain import dist, launch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
    launch.join("pytorch")
    step_overhead.BLOCK = BLOCK
    contenders = {
        "bare": lambda iters, tick: bare(engine, dist.default_device(), iters, tick),
        "mmtrain": lambda iters, tick: with_mmtrain(engine, str(folder / "work"), iters, tick),
    }
    times = step_overhead.Turns(contenders).run(contenders, (blocks + 1) * BLOCK)
    if dist.is_main():
        (folder / "times.json").write_text(json.dumps(times))
    launch.leave()


def run(engine, processes, blocks):
    """Start the group of processes for one engine; returns the figures."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
            __file__, "--measure", engine, "--folder", folder, "--blocks", str(blocks),
        ]  # fmt: skip
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        times = json.loads((Path(folder) / "times.json").read_text())
    ratios = [own / base for own, base in zip(times["mmtrain"], times["bare"], strict=False)]
    half = statistics.quantiles(ratios, n=4)
    return {
        "turns": len(ratios),
        "bare_us": statistics.median(times["bare"]),
        "mmtrain_us": statistics.median(times["mmtrain"]),
        "own_us": statistics.median(own - base for own, base in zip(times["mmtrain"], times["bare"], strict=False)),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [half[0], half[2]],
        "met": statistics.median(ratios) <= TARGET,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--measure", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure, arguments.folder, arguments.blocks)
        return
    written = RESULTS / "strategies.json"
    figures = json.loads(written.read_text())["engines"] if written.exists() else {}  # keep those of other engines
    print(f"{'':8}{'bare, ms':>10}{'mmtrain, ms':>14}{'ratio':>8}   quartiles")
    for engine in arguments.engines:
        found = figures[engine] = run(engine, arguments.processes, arguments.blocks) | {"commit": commit()}
        low, high = found["ratio_quartiles"]
        print(
            f"{engine:8}{found['bare_us'] / 1e3:10.2f}{found['mmtrain_us'] / 1e3:14.2f}{found['ratio']:8.4f}"
            f"   {low:.4f} to {high:.4f}",
            flush=True,
        )
    record = {"processes": arguments.processes, "target": TARGET, "engines": figures}
    print(f"written to {write_result('strategies', record)}")


if __name__ == "__main__":
    main()
