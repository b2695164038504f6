"""Peak resident memory during two asynchronous saves, minus that before, in copies of the state.

checkpoint_io.py starts one process for each kind of save.

Usage: python benchmarks/checkpoint_memory.py mmtrain|DCP LAYERS FOLDER
"""

import json
import sys
from pathlib import Path

import torch
from checkpoint_io import State, join_one_process

from mmtrain.checkpoint import CheckpointStore


def main():
    kind, layers, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    state = State(layers)
    join_one_process()
    store = CheckpointStore(folder / "store")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, see proc(5)
    before = resident("VmRSS")
    for number in range(2):
        if kind == "DCP":
            torch.distributed.checkpoint.async_save(state.nested(), checkpoint_id=folder / f"d{number}").result()
        else:
            store.save(f"iter_{number}.pth", state.sections, blocking=False).wait()
    print(json.dumps((resident("VmHWM") - before) / state.bytes))


def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


if __name__ == "__main__":
    main()
