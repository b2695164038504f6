"""Peak memory of training, without imports, compared with a bare loop that does the same.

Each contender trains a network of 25 million parameters with AdamW for 30 iterations, in a fresh process and in several
rounds. The result is the peak resident size minus that of the same process before training.

Usage: python benchmarks/memory.py [--rounds 3]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile

from common import write_result

PARTS = """
import resource, sys, json
import torch
from torch import nn
torch.set_num_threads(1)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(1250, 1250) for _ in range(16)])
    def forward(self, x):
        return dict(loss=self.layers(x).square().mean())

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 64 * 30
    def __getitem__(self, index):
        return dict(x=torch.full((1250,), float(index % 7)))

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
"""
BARE = """
model = Net()
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
start = peak()
for batch in torch.utils.data.DataLoader(Data(), batch_size=64):
    loss = model(**batch)['loss']
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(json.dumps([start, peak()]))
"""
OURS = """
from mmengine.config import Config
from mmtrain.runner import FlexibleRunner
import mmtrain.hooks
runner = FlexibleRunner.from_cfg(Config(dict(
    model=Net(), work_dir=sys.argv[1], train_dataloader=dict(dataset=Data(), batch_size=64),
    train_cfg=dict(by_epoch=False, max_iters=30), optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-3)),
    param_scheduler=dict(type='CosineAnnealingLR', by_epoch=False),
    default_hooks=dict(checkpoint=dict(interval=-1, save_last=False)), log_level='ERROR')))
start = peak()
runner.train()
print(json.dumps([start, peak()]))
"""


def measure(code):
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(
            [sys.executable, "-c", PARTS + code, folder], capture_output=True, text=True, check=True
        )
    return json.loads(result.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    peaks = {"bare": [], "mmtrain": []}
    for _ in range(rounds):
        for name, code in (("bare", BARE), ("mmtrain", OURS)):
            peaks[name].append(measure(code))
    figures = {}
    for name, values in peaks.items():
        before, after = (statistics.median(column) for column in zip(*values, strict=True))
        figures[name] = {"before_training": before, "peak": after, "training": after - before}
        print(f"{name:10}{before / 1e6:10.1f} MB before training{after / 1e6:10.1f} MB at the peak")
    ratio = figures["mmtrain"]["training"] / figures["bare"]["training"]
    print(f"training takes {ratio:.3f} times the memory of the bare loop")
    write_result("memory", {"bytes": figures, "training_ratio": ratio})


if __name__ == "__main__":
    main()
