"""What grows with the number of ranks and samples: the manifest, exchanges, the order of an epoch, the ledger.

Where only the lists of many ranks are needed, the real code runs on simulated lists. Exchanges are counted in real
processes on this machine. Seconds are CPU time, except for writing.
Usage: python benchmarks/scaling.py [--ranks 4096] [--tensors 300]
"""

import argparse
import json
import os
import pickle
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from array import array
from pathlib import Path
from types import SimpleNamespace

from common import write_result

ROOT = Path(__file__).resolve().parent.parent


# ---- the manifest of many ranks
def rank_part(rank, ranks, tensors, *, sharded):
    """What one rank sends after writing: its files and its share of the index."""
    from mmtrain.checkpoint.format.index import ShardEntry, TensorEntry
    from mmtrain.checkpoint.format.manifest import FileRecord
    from mmtrain.checkpoint.write.saver import RankResult

    record = FileRecord(123_456_789, f"{rank:032x}")
    stem = f"rank_{rank:05d}"
    files = {f"rng/{stem}.json": record, f"rng/{stem}.safetensors": record}
    index = {f"rng/{stem}": {"generators.torch": TensorEntry("U8", (5056,), (ShardEntry(
        f"rng/{stem}.safetensors", 200, (0,), (5056,)),))}}  # fmt: skip
    if not sharded and rank:
        return RankResult(files, index)
    rows = 4096 // ranks if sharded else 4096
    for section, share in (("model", 1), ("optimizer", 2)):
        path = f"{section}/{stem}_part_00000.safetensors"
        files[path] = record
        index[section] = {
            f"blocks.{number // 8}.part.{number % 8}.weight": TensorEntry(
                "F32", (4096, 1024), (ShardEntry(path, 4096 * number, (rank * rows, 0), (rows, 1024)),)
            )
            for number in range(share * tensors // 3)
        }
    return RankResult(files, index)


def manifest_of(ranks, tensors, folder, *, sharded):
    """Bytes and seconds of rank 0's work on the messages of all ranks at a save, and of a reader's at a load."""
    from mmtrain.checkpoint.format.index import decode_index, encode_index, merge
    from mmtrain.checkpoint.format.manifest import Manifest, decode, encode

    messages = [pickle.dumps(rank_part(rank, ranks, tensors, sharded=sharded)) for rank in range(ranks)]
    took = {}

    def timed(name, work, clock=time.process_time):
        begin = clock()
        result = work()
        took[name] = round(clock() - begin, 4)
        return result

    parts = timed("unpack", lambda: [pickle.loads(message) for message in messages])
    index = timed("merge and encode the index", lambda: encode_index(merge([part.index for part in parts])))
    files = {path: record for part in parts for path, record in part.files.items()}
    data = timed("encode the manifest", lambda: encode(Manifest(name="iter_1.pth", files=files, world_size=ranks)))

    def write():
        for name, blob in (("tensors.json", index), ("manifest.json", data)):
            with (folder / name).open("wb") as file:
                file.write(blob)
                os.fsync(file.fileno())

    timed("write and fsync both", write, clock=time.perf_counter)
    timed("read the manifest", lambda: decode(data))
    timed("read the index", lambda: decode_index(index))
    return {
        "ranks": ranks, "files": len(files), "bytes_a_rank_sends": len(messages[-1]),
        "bytes_rank_0_receives": sum(map(len, messages)), "manifest_bytes": len(data), "index_bytes": len(index),
        "seconds": took,
    }  # fmt: skip


# ---- the order of an epoch
def order_costs():
    from mmtrain.data.permutation import STORED_LIMIT, ComputedOrder, StoredOrder

    found = {}
    sizes = (("held", StoredOrder, STORED_LIMIT), ("computed", ComputedOrder, STORED_LIMIT + 1))
    for name, make, size in (*sizes, ("computed", ComputedOrder, 10**10)):
        begin = time.process_time()
        order = make(size, 1, 0)
        made = time.process_time() - begin
        steps = {}
        for stride in (8, 64, 1024, 32768):  # a batch of 8 on 1, 8, 128 and 4096 ranks
            begin = time.process_time()
            for number in range(300):
                order.take(number * stride, number * stride + 8)
            steps[stride] = round((time.process_time() - begin) / 300 * 1e6, 2)
        begin = time.process_time()
        order.take(size // 2, size // 2 + 1_000_000)
        bulk = time.process_time() - begin
        tracemalloc.start()
        fresh = make(size, 1, 1)
        for number in range(3):  # the second call begins to compute ahead
            fresh.take(number * 1024, number * 1024 + 8)
        held = tracemalloc.get_traced_memory()[0] + (4 * size if name == "held" else 0)  # torch's memory
        tracemalloc.stop()
        found[f"{name} {size}"] = {
            "seconds_to_make": round(made, 4), "bytes_held": held, "microseconds_a_sample_in_bulk": round(bulk, 4),
            "microseconds_a_batch_of_8_by_global_batch": steps,
        }  # fmt: skip
    return found


# ---- the ledger
def ledger_costs(epochs=100, batch=32, iterations=500):
    from mmtrain.checkpoint.format.tree import split, to_json
    from mmtrain.data.ledger import IterationSpan, Ledger, join_ranks, read_span, write_span
    from mmtrain.data.permutation import StoredOrder
    from mmtrain.progress import Progress
    from mmtrain.types import Batch, SampleIndices

    size = batch * iterations

    sampler = SimpleNamespace(order={"size": size, "seed": 1, "shuffle": True, "drop_last": False})
    ledger, progress, spent = Ledger(SimpleNamespace(batch_size=batch, sampler=sampler)), Progress(), []
    ledger.begin(progress)
    for epoch in range(epochs):
        order = StoredOrder(size, 1, epoch)
        for number in range(iterations):
            start = number * batch
            indices = SampleIndices(epoch, start, array("q", order.take(start, start + batch)).tobytes())
            one = Batch(None, batch, number + 1 == iterations, 1.0, indices)
            begin = time.perf_counter()
            ledger.observe(one, iteration=progress.iteration, update=progress.update, micro=0)
            spent.append(time.perf_counter() - begin)
            progress.advance(batch, epoch_end=one.epoch_end)
            progress.count_update(iterations=1, applied=True)
    size_of = len(to_json(split(ledger.state_dict())[0]))
    ranks = {}
    for world in (1, 64, 1024, 4096):
        spans = [IterationSpan(0, 0, 8 * rank, 8, 8 * world, 500, 0, 0, 0, 1 << 63) for rank in range(world)]
        messages = [write_span(span) for span in spans]
        begin = time.perf_counter()
        joined = join_ranks(map(read_span, messages))
        took = time.perf_counter() - begin
        assert len(joined) == 1
        sent = len(pickle.dumps(messages[:1]))
        ranks[world] = {"bytes_a_rank_sends": sent, "seconds_to_join": round(took, 5)}
    return {
        "samples": epochs * size, "passes": epochs, "bytes_in_checkpoint": size_of, "bytes_a_pass": size_of / epochs,
        "microseconds_an_iteration": round(statistics.median(spent) * 1e6, 1), "batch": batch, "save": ranks,
    }  # fmt: skip


# ---- exchanges, counted in real processes
PARTS = """
import torch
from mmtrain.registry import DATASETS, MODELS


@DATASETS.register_module()
class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4096

    def __getitem__(self, index):
        return dict(x=torch.ones(64))


@MODELS.register_module()
class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(64, 64)

    def forward(self, x):
        return dict(loss=self.line(x).square().mean())
"""


def watch_collectives(counts):
    """Count name and bytes of every exchange that Python code starts; DDP exchanges gradients in C++."""
    import torch.distributed as group

    def size(args):
        first = args[0]
        if hasattr(first, "nbytes"):
            return first.nbytes
        empty = isinstance(first, list) and first and first[0] is None  # the output of an all-gather; its input follows
        return len(pickle.dumps(args[1] if empty and len(args) > 1 else first))

    def patch(name):
        original = getattr(group, name)

        def counted(*args, **kwargs):
            counts.append((name, 0 if name == "barrier" else size(args)))
            return original(*args, **kwargs)

        setattr(group, name, counted)

    objects = ("all_gather_object", "gather_object", "broadcast_object_list")
    for name in ("all_reduce", "broadcast", "barrier", "reduce", *objects):
        patch(name)


def run_rank(folder, *, ledger):
    """One rank: train 12 iterations, log every 5, save after the eighth, resume; rank 0 writes the exchanges."""
    import torch
    from mmengine.config import Config

    torch.set_num_threads(1)
    counts, phases = [], {}
    watch_collectives(counts)
    from mmtrain import launch
    from mmtrain.hooks import Hook
    from mmtrain.runner import FlexibleRunner

    class SplitByIteration(Hook):
        """Stores the exchanges since the start of the last iteration under its number."""

        name = ""

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            phases[self.name or "start"] = list(counts)
            counts.clear()
            self.name = str(runner.iter + 1)

    def train(iterations):
        phases.clear()
        counts.clear()
        FlexibleRunner.from_cfg(Config({
            "work_dir": str(folder / "work"), "model": {"type": "Line"}, "resume": True, "log_level": "ERROR",
            "custom_imports": {"imports": ["scaling_parts"]}, "custom_hooks": [SplitByIteration()],
            "train_dataloader": {"dataset": {"type": "Rows"}, "batch_size": 8},
            "optim_wrapper": {"optimizer": {"type": "AdamW", "lr": 1e-3}},
            "train_cfg": {"by_epoch": False, "max_iters": iterations, "ledger": ledger},
            "default_hooks": {
                "logger": {"type": "LoggerHook", "interval": 5}, "progress": None,
                "checkpoint": {"type": "CheckpointHook", "interval": 8, "async_save": False, "save_last": False},
            },
        })).train()  # fmt: skip
        return dict(phases)

    launch.join()
    found = {**train(12), "resume": train(13)["start"]}
    if int(os.environ["RANK"]) == 0:
        (folder / "exchanges.json").write_text(json.dumps(found))
    launch.leave()


def exchanges(world, *, ledger):
    """What ``world`` processes exchange, by phase: [name, bytes per rank] each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "scaling_parts.py").write_text(PARTS)
        command = [sys.executable, __file__, "--rank-of", folder, *(["--ledger"] if ledger else [])]
        shared = {
            "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}:{folder}",
        }  # fmt: skip
        ranks = []
        for rank in map(str, range(world)):
            environment = {**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank}
            ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
        statuses = [rank.wait(timeout=300) for rank in ranks]
        if any(statuses):
            raise SystemExit(f"a rank of {world} failed: statuses {statuses}")
        found = json.loads(Path(folder, "exchanges.json").read_text())
    wanted = {
        "start": "start", "iteration that does not log": "4", "iteration that logs": "5",
        "iteration that saves": "8", "start that resumes": "resume",
    }  # fmt: skip
    return {
        name: {"exchanges": len(found[key]), "bytes": sum(count for _, count in found[key]), "each": found[key]}
        for name, key in wanted.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4096, help="the largest number of ranks whose lists are joined")
    parser.add_argument("--tensors", type=int, default=300, help="number of tensors of model and optimizer")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ledger", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of is not None:
        run_rank(options.rank_of, ledger=options.ledger)
        return
    worlds = [world for world in (1, 8, 64, 512, 4096) if world <= options.ranks]
    with tempfile.TemporaryDirectory() as folder:
        manifests = {
            kind: [manifest_of(world, options.tensors, Path(folder), sharded=kind == "sharded") for world in worlds]
            for kind in ("whole", "sharded")
        }
    figures = {
        "tensors": options.tensors,
        "manifest": manifests,
        "order": order_costs(),
        "ledger": ledger_costs(),
        "exchanges": {world: exchanges(world, ledger=False) for world in (2, 3, 4)},
        "exchanges_with_ledger": {2: exchanges(2, ledger=True)},
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(figures, indent=1, default=str))
    write_result("scaling", figures)


if __name__ == "__main__":
    main()
