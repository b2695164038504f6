"""Cost of a checkpoint of 1.2 GB: mmtrain, a memory copy, the bare disk, torch.save, torch DCP and MMEngine.

The state is a GPT of 100 M parameters in float32 with AdamW's two moments, a few hundred tensors from 3 KB to 57 MB.
Everything runs in rounds in one process; every other round runs in reverse order. A ratio is the median over rounds of
the ratio within a round, so that changes in the machine's speed affect both sides alike. The first round warms up
(allocates buffers, fills the page cache) and is not counted.

* memory copy: `Tensor.copy_` of the state into buffers that were used before, with two threads (as many as the stager
  may use) and with one. The target is 1.2 times the one with the lower median.
* stall: the time that training waits, `save()` plus `wait_staged()` of what it returned. "at once" has nothing between
  the two calls, the worst case. "behind compute" has about a second of matrix products there, in place of a forward
  and backward; "drag" is by how much these become slower.
* DCP's stall is that of `async_save`, with the default stager and with one that reuses its buffers; the target is the
  faster.
* disk: `os.write` of 16 MiB chunks into as many files of the same sizes, with fsync at the end of each, one after the
  other and with two threads; the target is the former, the disk's sequential speed.
* torch.save and MMEngine's save_checkpoint do not fsync; both are measured with a following fsync and without.
* load: into existing tensors, from files in the page cache; the same with `torch.load(mmap=True)` and a copy.
* first async stall: of a new store, whose buffer was made in the background before, or is made by the save.
* memory: see checkpoint_memory.py. many: thousands of small tensors, see checkpoint_many.py.

Usage: python benchmarks/checkpoint_io.py [--rounds 5] [--layers 12] [--many 20000] [--folder DIR]
"""

import argparse
import json
import logging
import operator
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from checkpoint_many import ManyTensors
from common import write_result
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from mmtrain.checkpoint import CheckpointStore  # noqa: E402

warnings.filterwarnings("ignore")  # torch's, about deprecated functions that DCP and mmengine use
logging.disable(logging.WARNING)  # mmengine logs at every save

CHUNK = 16 << 20
WIDTH, VOCABULARY = 768, 18432
FIRST = ("buffer made before", "buffer made then")
PLANS = ("plan kept", "new plan")


class State:
    """Model, optimizer with moments, and their tensors as mmtrain's sections."""

    def __init__(self, layers):
        torch.manual_seed(0)
        self.model = gpt_like(layers)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        for parameter in self.model.parameters():
            self.optimizer.state[parameter] = {
                "step": torch.tensor(1.0),
                "exp_avg": torch.randn_like(parameter),
                "exp_avg_sq": torch.rand_like(parameter),
            }
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        moments = {
            f"{names[parameter]}/{slot}": value
            for parameter, slots in self.optimizer.state.items()
            for slot, value in slots.items()
        }
        weights = {name: value.detach() for name, value in self.model.state_dict().items()}
        self.sections = {"model": weights, "optimizer": moments}
        self.tensors = [*weights.values(), *moments.values()]
        self.bytes = sum(tensor.nbytes for tensor in self.tensors)

    def nested(self):
        """The state in the form that torch.save, DCP and MMEngine take."""
        return {"state_dict": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}


def gpt_like(layers):
    block = {
        "ln_1": (WIDTH,), "qkv": (3 * WIDTH, WIDTH), "qkv_bias": (3 * WIDTH,), "proj": (WIDTH, WIDTH),
        "proj_bias": (WIDTH,), "ln_2": (WIDTH,), "fc": (4 * WIDTH, WIDTH), "fc_bias": (4 * WIDTH,),
        "out": (WIDTH, 4 * WIDTH), "out_bias": (WIDTH,),
    }  # fmt: skip
    model = nn.Module()
    shapes = {"token": (VOCABULARY, WIDTH), "position": (1024, WIDTH), "ln_f": (WIDTH,)}
    shapes |= {f"block_{layer}_{name}": shape for layer in range(layers) for name, shape in block.items()}
    for name, shape in shapes.items():
        model.register_parameter(name, nn.Parameter(torch.randn(shape) * 0.02))
    return model


def timed(function, *args):
    begin = time.perf_counter()
    function(*args)
    return time.perf_counter() - begin


def medians(times):
    return {name: statistics.median(each[name] for each in times) for name in times[0]}


class Bench:
    """One method for each contender; each returns seconds by name and removes the files it wrote."""

    def __init__(self, state, folder, many):
        self.state, self.folder = state, folder
        self.many = ManyTensors(many, folder)
        self.store = CheckpointStore(folder / "store", threads=2)
        self.buffers = [torch.empty_like(tensor) for tensor in state.tensors]
        self.store.save("kept.pth", state.sections, blocking=True)
        self.sizes = [path.stat().st_size for path in (folder / "store" / "kept.pth").rglob("*") if path.is_file()]
        torch.save(state.sections, folder / "kept.pth")
        self.a, self.b = torch.randn(1536, 1536), torch.randn(1536, 1536)
        self.products = 1
        while (spent := timed(self.compute)) < 1.0:
            self.products = max(self.products + 1, int(self.products * 1.1 / max(spent, 0.05)))
        self.stager = reusing_stager()

    def compute(self):
        for _ in range(self.products):
            self.a @ self.b

    # ---- asynchronous saves
    def copies_and_stall(self):
        """Medians of three, because they are short."""
        return medians([self._copies() | self._mmtrain_async() for _ in range(3)])

    def _copies(self):
        def copy():
            for target, source in zip(self.buffers, self.state.tensors, strict=True):
                target.copy_(source)

        threads, seconds = torch.get_num_threads(), {}
        for count in (2, 1):
            torch.set_num_threads(count)
            seconds[f"memory copy, {count} thread{'s' * (count > 1)}"] = timed(copy)
        torch.set_num_threads(threads)
        return seconds

    def _mmtrain_async(self):
        begin = time.perf_counter()
        pending = self.store.save("a.pth", self.state.sections, blocking=False)
        pending.wait_staged()
        stall = time.perf_counter() - begin
        pending.wait()
        total = time.perf_counter() - begin
        self._remove("store/a.pth")
        return {"mmtrain async stall, at once": stall, "mmtrain async total": total}

    def mmtrain_async_behind_compute(self):
        """Medians of three, like the copies it is compared with."""
        return medians([self._behind_compute() for _ in range(3)])

    def _behind_compute(self):
        alone = timed(self.compute)
        begin = time.perf_counter()
        pending = self.store.save("a.pth", self.state.sections, blocking=False)
        saved = time.perf_counter()
        self.compute()
        computed = time.perf_counter()
        pending.wait_staged()
        staged = time.perf_counter()
        pending.wait()
        self._remove("store/a.pth")
        return {
            "mmtrain async stall, behind compute": saved - begin + staged - computed,
            "mmtrain async drag on compute": computed - saved - alone,
        }

    def first_async(self):
        """The stall of a store's first save, with and without `CheckpointStore.prepare` after the first update."""
        seconds = {}
        for name in FIRST:
            store = CheckpointStore(self.folder / "first", threads=2)
            if name == FIRST[0]:
                store.prepare(self.state.sections)
                assert store.buffer_bytes  # waits for it, as training would take some time
            begin = time.perf_counter()
            pending = store.save("a.pth", self.state.sections, blocking=False)
            pending.wait_staged()
            seconds[f"first async stall, {name}"] = time.perf_counter() - begin
            store.close()
            self._remove("first")
        return seconds

    def many_tensors(self):
        return self.many.run()

    def dcp_async(self):
        return self._dcp("DCP async")

    def dcp_async_reusing(self):
        return self._dcp("DCP async (reused buffers)", async_stager=self.stager)

    def _dcp(self, name, **options):
        begin = time.perf_counter()
        state, place = self.state.nested(), self.folder / "dcp"
        future = torch.distributed.checkpoint.async_save(state, checkpoint_id=place, **options)
        stall = time.perf_counter() - begin
        future.result()
        total = time.perf_counter() - begin
        self._remove("dcp")
        return {f"{name} stall": stall, f"{name} total": total}

    # ---- synchronous saves
    def synchronous(self):
        """Medians of three in rotating order, because each write slows down the next."""
        times, savers = [], [self.disk, self.mmtrain_sync, self.torch_save]
        for _ in range(3):
            savers.append(savers.pop(0))
            times.append({name: value for saver in savers for name, value in saver().items()})
        return medians(times)

    def disk(self):
        data = memoryview(self.buffers[0].view(-1).view(torch.uint8).numpy())
        paths = [self.folder / f"raw-{number}" for number in range(len(self.sizes))]

        def write(path, size):
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            while size:
                start = size % (len(data) - CHUNK)
                size -= os.write(handle, data[start : start + min(size, CHUNK)])
            os.fsync(handle)
            os.close(handle)

        def in_turn():
            list(map(write, paths, self.sizes))

        def in_parallel():
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(write, paths, self.sizes))

        seconds = {}
        for name, function in {"disk, sequential": in_turn, "disk, 2 threads": in_parallel}.items():
            seconds[name] = timed(function)
            self._remove(*(path.name for path in paths))
        return seconds

    def mmtrain_sync(self):
        seconds = {"mmtrain sync save": timed(lambda: self.store.save("s.pth", self.state.sections, blocking=True))}
        self._remove("store/s.pth")
        return seconds

    def torch_save(self):
        return self._with_fsync("torch.save", lambda path: torch.save(self.state.nested(), path))

    def mmengine_save(self):
        from mmengine.runner.checkpoint import save_checkpoint

        name = "MMEngine save_checkpoint"
        return self._with_fsync(name, lambda path: save_checkpoint(self.state.nested(), str(path)))

    def _with_fsync(self, name, save):
        path = self.folder / "one.pth"
        begin = time.perf_counter()
        save(path)
        written = time.perf_counter() - begin
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        total = time.perf_counter() - begin
        self._remove(path.name)
        return {name: written, f"{name} + fsync": total}

    # ---- loads
    def mmtrain_load(self):
        def load(verify):
            checkpoint = self.store.open("kept.pth", verify=verify)
            for section, into in self.state.sections.items():
                checkpoint.load(section, into)

        return {"mmtrain load": timed(load, "none"), "mmtrain load, hashes checked": timed(load, "full")}

    def torch_load(self):
        def load():
            loaded = torch.load(self.folder / "kept.pth", mmap=True, weights_only=True)
            for section, into in self.state.sections.items():
                for name, target in into.items():
                    target.copy_(loaded[section][name])

        return {"torch.load mmap + copy": timed(load)}

    def check(self):
        """Check that loading gives what was saved."""
        before = [tensor.clone() for tensor in self.state.tensors]
        for load in (self.mmtrain_load, self.torch_load):
            for tensor in self.state.tensors:
                tensor.zero_()
            load()
            assert all(map(torch.equal, before, self.state.tensors)), load

    def _remove(self, *names):
        for name in names:
            path = self.folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    CONTENDERS = (
        copies_and_stall, dcp_async, dcp_async_reusing, mmtrain_async_behind_compute,
        synchronous, mmengine_save, mmtrain_load, torch_load, first_async, many_tensors,
    )  # fmt: skip

    def run(self, rounds):
        """Run all contenders in turn; returns seconds by name, one value per round."""
        seconds = {}
        for number in range(rounds + 1):
            for contender in self.CONTENDERS[:: 1 if number % 2 == 0 else -1]:
                for name, value in contender(self).items():
                    if number:
                        seconds.setdefault(name, []).append(value)
            print(f"round {number} of {rounds}" + " (warm-up)" * (number == 0), file=sys.stderr, flush=True)
        return seconds


def reusing_stager():
    """DCP's stager that keeps its buffers between saves, without the options that need an accelerator."""
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    off = ("use_pinned_memory", "use_shared_memory", "use_async_staging", "use_non_blocking_copy")
    return DefaultStager(StagingOptions(**dict.fromkeys(off, False)))


def join_one_process():
    """Create the process group that DCP's async_save needs, of one process."""
    import torch.distributed.checkpoint

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)


# ---- memory, one process for each kind
def measure_memory(layers, folder):
    copies = {}
    for kind in ("mmtrain", "DCP"):
        (place := folder / f"memory-{kind}").mkdir()
        command = [sys.executable, str(ROOT / "benchmarks" / "checkpoint_memory.py"), kind, str(layers), str(place)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        copies[kind] = json.loads(done.stdout.splitlines()[-1])
        shutil.rmtree(place)
    return copies


# ---- the targets
def judge(seconds, memory):
    """Compare with the targets; a ratio is the median of the rounds' ratios."""

    def faster(*names):
        return min(names, key=lambda name: statistics.median(seconds[name]))

    def ratio(a, b):
        return statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))

    copy = faster("memory copy, 2 threads", "memory copy, 1 thread")
    dcp = faster("DCP async stall", "DCP async (reused buffers) stall")
    at_once, behind = "mmtrain async stall, at once", "mmtrain async stall, behind compute"
    sync, load = "mmtrain sync save", "torch.load mmap + copy"
    rows = [
        (f"async stall at once / {copy}", ratio(at_once, copy), "<=", 1.2),
        (f"async stall behind compute / {copy}", ratio(behind, copy), "<=", 1.2),
        (f"async stall at once / {dcp}", ratio(at_once, dcp), "<", 1.0),
        ("sync save speed / disk's sequential speed", 1 / ratio(sync, "disk, sequential"), ">=", 0.8),
        ("sync save / torch.save + fsync", ratio(sync, "torch.save + fsync"), "<", 1.0),
        ("load / torch.load mmap + copy", ratio("mmtrain load", load), "<=", 1.0),
        ("peak extra memory / state", memory["mmtrain"], "<=", 1.1),
        ("first async stall: buffer made before / then", ratio(*(f"first async stall, {n}" for n in FIRST)), "<", 1.0),
        ("many: stall with the plan kept / new plan", ratio(*(f"many: async stall, {n}" for n in PLANS)), "<=", 0.5),
        ("many: sync save / torch.save", ratio("many: mmtrain sync save", "many: torch.save"), "<=", 1.0),
        ("many: load / torch.load", ratio("many: mmtrain load", "many: torch.load mmap + copy"), "<=", 1.0),
    ]
    met = {"<=": operator.le, "<": operator.lt, ">=": operator.ge}
    return [{"what": w, "value": v, "target": f"{op} {bound}", "met": met[op](v, bound)} for w, v, op, bound in rows]


def report(seconds, targets, memory, size):
    print(f"{size / 1e9:.2f} GB\n{'':40}{'median s':>10}{'min s':>10}{'MB/s':>10}")
    for name, values in seconds.items():
        median = statistics.median(values)
        speed = "" if "drag" in name or "many" in name else f"{size / median / 1e6:10.0f}"
        print(f"{name:40}{median:10.3f}{min(values):10.3f}{speed}")
    for kind, copies in memory.items():
        print(f"{f'peak extra memory, {kind} async':40}{copies:10.2f} copies of the state")
    for row in targets:
        print(f"{row['what']:56}{row['value']:8.3f}  {row['target']:8}{'met' if row['met'] else 'NOT MET'}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=12, help="12 are 100 M parameters, 1.2 GB of state")
    parser.add_argument("--many", type=int, default=20_000, help="parameters of the case of many small tensors")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder if not given")
    parser.add_argument("--no-write", action="store_true", help="leave results as they are")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        memory = measure_memory(options.layers, Path(name))
        join_one_process()
        bench = Bench(State(options.layers), Path(name), options.many)
        bench.check()
        seconds = bench.run(options.rounds)
        bench.store.close()
        bench.many.close()
        size, files = bench.state.bytes, len(bench.sizes)
    targets = judge(seconds, memory)
    report(seconds, targets, memory, size)
    figures = {
        "bytes": size,
        "files": files,
        "many_tensors": bench.many.tensors,
        "targets": targets,
        "peak_extra_memory_in_states": memory,
    }
    figures |= {"seconds": {name: statistics.median(times) for name, times in seconds.items()}, "all_rounds": seconds}
    if not options.no_write:
        print(f"written to {write_result('checkpoint_io', figures)}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
