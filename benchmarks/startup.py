"""Time from process start to the end of the first iteration, and those of `import torch` and of a bare loop.

Each round starts three fresh processes in turn. Usage: python benchmarks/startup.py [--rounds 5]
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import write_result

ROOT = Path(__file__).resolve().parent.parent

IMPORT = "import time, torch; print(time.time())"
BARE = """
import time
import torch
model = torch.nn.Linear(8, 8)
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
model(torch.randn(4, 8)).sum().backward()
optimizer.step()
print(time.time())
"""
CONFIG = """
train_dataloader = dict(dataset=dict(type='Numbers'), batch_size=4, shuffle=True)
model = dict(type='Line')
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=1e-3))
param_scheduler = dict(type='CosineAnnealingLR', by_epoch=False)
train_cfg = dict(by_epoch=False, max_iters=1)
default_hooks = dict(checkpoint=dict(type='CheckpointHook', interval=-1, save_last=False))
custom_hooks = [dict(type='FirstIteration')]
custom_imports = dict(imports=['startup_parts'])
"""
PARTS = """
import time
import torch
from mmtrain.hooks import Hook
from mmtrain.registry import DATASETS, HOOKS, MODELS


@HOOKS.register_module()
class FirstIteration(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        print(time.time())


@DATASETS.register_module()
class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        return dict(x=torch.ones(8))


@MODELS.register_module()
class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(8, 8)

    def forward(self, x):
        return dict(loss=self.line(x).square().mean())
"""


def timed(command, cwd):
    """Seconds from the start of a process to the time that it prints."""
    start = time.time()
    result = subprocess.run(command, check=True, cwd=cwd, capture_output=True, text=True)
    return float(result.stdout) - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    times = {"import torch": [], "bare first iteration": [], "mmtrain first iteration": []}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.py").write_text(CONFIG)
        Path(folder, "startup_parts.py").write_text(PARTS)
        train = [sys.executable, str(ROOT / "tools" / "train.py"), "config.py"]
        timed(train, folder)  # compiles bytecode
        for _ in range(rounds):
            times["import torch"].append(timed([sys.executable, "-c", IMPORT], folder))
            times["bare first iteration"].append(timed([sys.executable, "-c", BARE], folder))
            times["mmtrain first iteration"].append(timed(train, folder))
    medians = {name: statistics.median(values) for name, values in times.items()}
    over = statistics.median(
        a - b for a, b in zip(times["mmtrain first iteration"], times["import torch"], strict=True)
    )
    for name, value in medians.items():
        print(f"{name:26}{value:8.2f} s")
    print(f"{'beyond import torch':26}{over:8.2f} s")
    write_result("startup", {"seconds": medians, "beyond_import_torch_seconds": over, "all_rounds": times})


if __name__ == "__main__":
    main()
