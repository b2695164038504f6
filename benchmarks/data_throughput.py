"""What a sample costs to load: torch's DataLoader and mmtrain's streams, and an earlier version of mmtrain beside them.

Cases: tiny samples (64 numbers), samples of 600 kB, and windows of 1024 tokens of a mapped file; map-style and
iterable; without workers and with 2; per-sample seeding on and off. Each contender has a process of its own. They take
turns, case by case: one loads for about a second while the others wait, so that a drift of the machine meets all alike.
Figures are medians over the rounds, in microseconds a sample: of the clock, and of the main process's processor time.

Usage: python benchmarks/data_throughput.py [--rounds 5] [--before COMMIT]

``--before`` measures the package of that commit in the same run.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
ENDLESS = 10**9
SECONDS = 1.0
BATCH = {"tiny": 32, "large": 8, "tokens": 8}


class Tiny:
    def __init__(self):
        self.rows = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return ENDLESS

    def __getitem__(self, index):
        return self.rows[index % 4096]


class Large(Tiny):
    def __init__(self):
        self.image = np.zeros((3, 224, 224), dtype=np.float32)  # 602 kB

    def __getitem__(self, index):
        return torch.from_numpy(self.image + index % 7)


class Tokens(Tiny):
    def __init__(self):
        self.file = Path(tempfile.gettempdir()) / "mmtrain_benchmark_tokens.bin"
        if not self.file.exists():
            np.arange(8_000_000, dtype=np.uint16).tofile(self.file)
        self.tokens = np.memmap(self.file, dtype=np.uint16, mode="r")

    def __getitem__(self, index):
        start = index * 1024 % (len(self.tokens) - 1025)
        window = torch.from_numpy(self.tokens[start : start + 1025].astype(np.int64))
        return window[:-1], window[1:]


class Iterated(torch.utils.data.IterableDataset):
    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        for index in itertools.count(0 if info is None else info.id, 1 if info is None else info.num_workers):
            yield self.dataset[index]


DATASETS = {"tiny": Tiny, "large": Large, "tokens": Tokens}
CASES = [
    {"data": data, "style": style, "num_workers": num_workers, "per_sample": per_sample}
    for data in DATASETS
    for style in ("map", "iterable")
    for num_workers in (0, 2)
    for per_sample in ((True, False) if style == "map" else (True,))
]


def loader(contender, case):
    """Return an endless iterator over batches, and what closes it."""
    dataset = DATASETS[case["data"]]()
    batch = BATCH[case["data"]]
    if case["style"] == "iterable":
        dataset = Iterated(dataset)
    if contender == "torch":
        order = {"sampler": Order()} if case["style"] == "map" else {}
        read = iter(torch.utils.data.DataLoader(dataset, batch, num_workers=case["num_workers"], **order))
        return read, lambda: None
    from mmtrain.data import build_train_stream

    cfg = {"dataset": dataset, "batch_size": batch, "num_workers": case["num_workers"]}
    stream = build_train_stream(cfg, seed=1, per_sample=case["per_sample"])
    return stream, stream.close


class Order:
    """Shuffled indices without a list of a billion."""

    def __len__(self):
        return ENDLESS

    def __iter__(self):
        return (index * 736_338_717 % ENDLESS for index in range(ENDLESS))


def measure(contender, case):
    read, close = loader(contender, case)
    for _ in range(40):  # starts workers, and lets mmtrain learn which generators the dataset uses
        next(read)
    began, cpu, batches = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - began < SECONDS:
        next(read)
        batches += 1
    samples = batches * BATCH[case["data"]]
    found = [(time.perf_counter() - began) / samples * 1e6, (time.process_time() - cpu) / samples * 1e6]
    close()
    return found


def serve(contender):
    """Measure the cases whose numbers come in, one a line, and print what was found."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(measure(contender, CASES[int(line)])), flush=True)


class Contender:
    def __init__(self, name, package):
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, "--serve", "torch" if name == "torch" else "mmtrain"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(package)},
        )  # fmt: skip

    def measure(self, number):
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def checkout(commit, folder):
    """Write the package of a commit into a folder."""
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", commit, "mmtrain"], stdout=subprocess.PIPE, check=True)
    subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
    return folder


def main():
    from common import write_result

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--before", help="a commit whose package is measured too")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    with tempfile.TemporaryDirectory() as folder:
        contenders = {"torch": Contender("torch", ROOT), "mmtrain": Contender("mmtrain", ROOT)}
        if options.before:
            contenders["before"] = Contender("before", checkout(options.before, folder))
        found = {name: [[] for _ in CASES] for name in contenders}
        for _ in range(options.rounds):
            for number in range(len(CASES)):
                for name, contender in contenders.items():
                    found[name][number].append(contender.measure(number))
        for contender in contenders.values():
            contender.process.stdin.close()
            contender.process.wait()
    rows = []
    print(f"{'us a sample: clock (processor)':42}" + "".join(f"{name:>20}" for name in contenders))
    for number, case in enumerate(CASES):
        medians = {
            name: [statistics.median(values) for values in zip(*found[name][number], strict=True)] for name in found
        }
        seeding = "" if case["style"] == "iterable" else "per sample" if case["per_sample"] else "per batch"
        label = f"{case['data']}, {case['style']}, {case['num_workers']} workers{', ' + seeding if seeding else ''}"
        print(f"{label:42}" + "".join(f"{clock:11.2f} ({cpu:6.2f})" for clock, cpu in medians.values()))
        rows.append({**case, "microseconds": {name: clock for name, (clock, _) in medians.items()},
                     "processor_microseconds": {name: cpu for name, (_, cpu) in medians.items()}})  # fmt: skip
    print(f"written to {write_result('data_throughput', {'before': options.before, 'batch': BATCH, 'cases': rows})}")


if __name__ == "__main__":
    main()
