"""Time from process start to the end of the first step after a resume, at iteration 1,000,000 and at iteration 10.

Real processes (tools/train.py --resume) read a virtual dataset of 10^8 samples, which records every index it is asked
for. A run of 10 iterations saves the checkpoint at iteration 10. The same run saves the one at 1,000,000 with a hook
that moves the position there before the save. A resume has to read the log, so this run's log gets as many lines as a
run of that length writes, one every 10 iterations; `--log-interval` changes that. Each round resumes both, from a copy
of their work directories, with 0 and with 2 data workers. The ratio is the median over rounds of the ratio within a
round. On noisy machines, look at the ratio of the main process's CPU time instead.

It also checks in every resumed run that only batches from the position on were read before the end of the first step
(without workers, exactly one batch), in the sampler's order, and that no sample was read twice.

The exit status is 1 if this check fails. Usage: python benchmarks/resume_time.py [--rounds 5] [--log-interval 10]
"""

import argparse
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import write_result

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

BATCH, SIZE, NEAR, FAR, SEED = 8, 10**8, 10, 10**6, 1
CONFIG = f"""
custom_imports = dict(imports=['resume_parts'])
work_dir = 'work'
resume = True
model = dict(type='Line')
train_dataloader = dict(dataset=dict(type='Virtual'), batch_size={BATCH}, num_workers=0)
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=1e-3))
param_scheduler = dict(type='CosineAnnealingLR', by_epoch=False)
train_cfg = dict(by_epoch=False, max_iters={10 * FAR})
default_hooks = dict(checkpoint=dict(type='CheckpointHook', interval=-1, save_last=False), progress=None)
custom_hooks = []
randomness = dict(seed={SEED})
"""
PARTS = f"""
import os, struct, time
from pathlib import Path
import torch
from mmtrain.hooks import Hook
from mmtrain.registry import DATASETS, HOOKS, MODELS

@DATASETS.register_module()
class Virtual(torch.utils.data.Dataset):
    def __init__(self):
        self.reads = os.open('reads', os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def __len__(self):
        return {SIZE}

    def __getitem__(self, index):
        os.write(self.reads, struct.pack('<q', index))
        return dict(x=torch.full((256,), index / {SIZE}))

@MODELS.register_module()
class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Sequential(torch.nn.Linear(256, 2048), torch.nn.ReLU(), torch.nn.Linear(2048, 256))

    def forward(self, x):
        return dict(loss=self.line(x).square().mean())

@HOOKS.register_module()
class SaveAndLeave(Hook):
    'At iteration {NEAR}: move the position to iteration `at`, save there, and end.'
    def __init__(self, at):
        self.at = at

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        progress = runner.progress
        if progress.iteration == {NEAR}:
            progress.iteration = progress.epoch_iteration = progress.update = self.at
            progress.samples = progress.offset = self.at * {BATCH}
            runner.request_save('made')
            runner.request_stop('saved')

@HOOKS.register_module()
class LeaveAtOnce(Hook):
    'After the first step: write its time and how much was read, and exit at once.'
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        now = time.time()
        count = os.path.getsize('reads') // 8
        Path('answer').write_text(f'{{now}} {{time.process_time()}} {{runner.progress.iteration}} {{count}}')
        os._exit(0)
"""


def train(folder, hook, *options):
    """Run the command with this custom hook; returns the time of its start."""
    (folder / "config.py").write_text(CONFIG.replace("custom_hooks = []", f"custom_hooks = [{hook!r}]"))
    command = [sys.executable, str(ROOT / "tools" / "train.py"), "config.py", *options]
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    begun = time.time()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return begun


def prepare(folder, iteration, log_interval):
    """Make a work directory whose newest checkpoint is at ``iteration``; returns the indices that were read."""
    folder.mkdir()
    (folder / "resume_parts.py").write_text(PARTS)
    train(folder, {"type": "SaveAndLeave", "at": iteration})
    assert (folder / "work" / f"iter_{iteration}.pth" / "manifest.json").exists()
    if iteration == FAR:
        write_long_log(folder / "work", log_interval)
    return take_reads(folder)


def write_long_log(work_dir, interval):
    (log,) = work_dir.glob("*/vis_data/scalars.json")
    line = json.loads(log.read_text().splitlines()[0])
    text = "".join(
        json.dumps({**line, "iter": step, "step": step}) + "\n" for step in range(interval, FAR + 1, interval)
    )
    log.write_text(text)


def take_reads(folder):
    """Return the indices read so far, in order, and delete the record."""
    path = folder / "reads"
    found = [index for (index,) in struct.iter_unpack("<q", path.read_bytes())]
    path.unlink()
    return found


def resume_once(source, workers):
    """Resume a copy of ``source``; returns wall and CPU seconds to the end of the first step, its number, the reads."""
    with tempfile.TemporaryDirectory(dir=source.parent) as name:
        folder = Path(name, "run")
        shutil.copytree(source, folder)
        begun = train(folder, {"type": "LeaveAtOnce"}, "--cfg-options", f"train_dataloader.num_workers={workers}")
        ended, busy, iteration, count = (folder / "answer").read_text().split()
        reads = take_reads(folder)[: int(count)]
    return (float(ended) - begun, float(busy)), int(iteration), reads


def expected_order(iteration, batches):
    """The next batches at a position, from the sampler."""
    from mmtrain.data.sampler import PositionSampler

    draws = PositionSampler(SIZE, BATCH, seed=SEED, shuffle=True).batch_indices(0, iteration * BATCH)
    return [draw.indices for draw, _ in zip(draws, range(batches), strict=False)]


def faults(iteration, first_step, reads, workers, before):
    """What is wrong with the reads of one resumed run, as sentences."""
    ahead = 1 + 2 * workers  # the first batch, and two that each worker prefetches
    batches = expected_order(iteration, ahead)
    found = []
    if first_step != iteration + 1:
        found.append(f"the first step was {first_step}")
    if len(set(reads)) < len(reads) or set(reads) & set(before):
        found.append("a sample was read twice")
    if not set(batches[0]) <= set(reads):
        found.append("the first batch was not the one at the position")
    if workers == 0 and reads != batches[0]:
        found.append(f"{len(reads)} samples were read for a batch of {BATCH}")
    if not set(reads) <= {index for batch in batches for index in batch}:
        found.append("samples were read that are not among the next batches")
    return [f"resume at {iteration} with {workers} workers: {fault}" for fault in found]


def compare(seconds, counts):
    """Print the table; returns the figures by number of workers."""
    print(f"{'workers':9}{f'at {NEAR}, s':>12}{f'at {FAR}, s':>16}{'ratio':>8}{'of cpu time':>14}{'samples read':>16}")
    figures = {}
    for workers in (0, 2):
        near, far = seconds[workers, NEAR], seconds[workers, FAR]
        wall, cpu = (statistics.median(b[i] / a[i] for a, b in zip(near, far, strict=True)) for i in (0, 1))
        reads = {f"at {iteration}": sorted(counts[workers, iteration]) for iteration in (NEAR, FAR)}
        figures[workers] = {
            "near_seconds": statistics.median(a for a, _ in near),
            "far_seconds": statistics.median(b for b, _ in far),
            "ratio": wall, "ratio_of_processor_time": cpu, "target": "<= 1.1", "met": wall <= 1.1,
            "samples_read_before_the_first_step_ended": reads, "rounds_wall_and_processor": {"near": near, "far": far},
        }  # fmt: skip
        row = f"{workers:<9}{figures[workers]['near_seconds']:12.2f}{figures[workers]['far_seconds']:16.2f}{wall:8.3f}"
        counted = " ".join(map(str, sorted(set().union(*reads.values()))))
        print(f"{row}{cpu:14.3f}{counted:>16}   ratio <= 1.1: {'met' if wall <= 1.1 else 'NOT MET'}")
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-write", action="store_true", help="leave results/resume_time.json as it is")
    parser.add_argument("--log-interval", type=int, default=10)
    options = parser.parse_args()
    cases = [(workers, iteration) for workers in (0, 2) for iteration in (NEAR, FAR)]
    seconds, counts, wrong = {case: [] for case in cases}, {case: set() for case in cases}, []
    with tempfile.TemporaryDirectory() as name:
        before = {
            iteration: prepare(Path(name, f"at-{iteration}"), iteration, options.log_interval)
            for iteration in (NEAR, FAR)
        }
        for number in range(options.rounds + 1):
            for workers, iteration in cases[:: 1 if number % 2 else -1]:
                spent, first_step, reads = resume_once(Path(name, f"at-{iteration}"), workers)
                wrong += faults(iteration, first_step, reads, workers, before[iteration])
                counts[workers, iteration].add(len(reads))
                if number:  # the first round warms up
                    seconds[workers, iteration].append(spent)
    figures = {"log_lines_at_far": FAR // options.log_interval, "workers": compare(seconds, counts), "faults": wrong}
    print("no sample was read twice, none before the position" if not wrong else "\n".join(wrong))
    if not options.no_write:
        print(f"written to {write_result('resume_time', figures)}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
