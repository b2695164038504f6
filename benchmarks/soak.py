"""Kill real runs with SIGKILL at random moments and start them again; they must end like runs that were not killed.

Every run has a different seed, dropout, augmentation that draws from torch, numpy and random, accumulation over 1, 2
or 3 iterations, 0 or 2 data workers (drawn again at every start), a moving average, validation, `save_best`, a hook
with state, and an asynchronous checkpoint every 10 iterations, of which two are kept. Each run is done once
uninterrupted and once with kills after uniformly random delays. Only the main process is killed; its workers have to
notice. Half of the delays begin at the end of the first step, when scalars.json has its first line, and half at the
start of the process; every second one of the latter covers only start-up and the first steps. So kills hit start-up,
training, validation, saves, deletions and the end of runs. The comparison covers all logged values, the metrics, the
last checkpoint bit by bit, the names of the checkpoints that remain, the pointer and best.json.

A run is *lost* if it ends with an error, hangs, or resumes from an older checkpoint than the newest complete one.

By default (--fork) each start is forked from a server process that has imported everything, which saves seconds of
imports per start. It is still a real process with its own pid, files, locks and data workers. --exec starts
`python tools/train.py` instead.

The exit status is 1 if a run was lost or differs; its folder is then kept.
Usage: python benchmarks/soak.py [--kills 200] [--seed 0] [--lanes 2] [--exec]
"""

import argparse
import contextlib
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SEARCH = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]
sys.path[:0] = SEARCH
# The server and its children find the same modules and use one thread each: two runs share two cores.
os.environ.update(PYTHONPATH=os.pathsep.join(SEARCH), OMP_NUM_THREADS="1")

from common import write_result  # noqa: E402

from mmtrain.registry import HOOKS  # noqa: E402

TRAIN = ROOT / "tools" / "train.py"
PRELOAD = ["mmtrain.cli.train", "mmtrain.runner.build", "mmtrain.hooks", "mmengine.dataset", "exactness", "soak"]
PRELOAD += ["torch._dynamo", "torch.onnx", "torch.testing"]  # torch imports them with the first optimizer
HANGS = 300.0  # seconds after which a start that has not ended counts as hung
WORKERS_LEAVE = 20.0  # seconds that data workers may outlive a killed parent
NAMES = ("uninterrupted", "killed")  # the two runs of a config


@HOOKS.register_module(force=True)
class Phase:
    """Writes the phase of the run to a file: t(raining) from the end of the first step on, v(alidation)."""

    priority = "LOWEST"

    def __init__(self, path):
        self.path, self.started = Path(path), False

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if not self.started:
            self.started = True
            self.path.write_text("t")

    def before_val_epoch(self, runner):
        if self.started:
            self.path.write_text("v")

    def after_val_epoch(self, runner, metrics=None):
        if self.started:
            self.path.write_text("t")


# ---- the runs
def write_config(folder, name, *, seed, iters, accumulation):
    """Write the config of one run in ``folder/name``; returns its path."""
    from parts import config

    points = {"type": "NoisyPoints", "size": 700, "width": 64}
    cfg = config(
        folder / name,
        resume=True,
        log_level="INFO",
        model={"width": 64, "hidden": 3072},
        train_dataloader={"dataset": points, "batch_size": 32},
        val_dataloader={"dataset": {**points, "size": 320, "augment": False}, "batch_size": 32},
        optim_wrapper={"accumulative_counts": accumulation},
        train_cfg={"max_iters": iters, "val_interval": 25},
        randomness={"seed": seed},
        default_hooks={
            "checkpoint": {"type": "CheckpointHook", "interval": 10, "max_keep_ckpts": 2, "save_best": "loss"},
            "ema": {"type": "EMAHook", "momentum": 0.05},
        },
        custom_hooks=[{"type": "Counter"}, {"type": "Phase", "path": str(folder / f"{name}.phase")}],
    )
    path = folder / f"{name}.py"
    lines = [f"{key} = {value!r}\n" for key, value in cfg.items()]
    path.write_text("custom_imports = dict(imports=['parts', 'soak'])\n" + "".join(lines))
    return path


def forked(argv, log):
    """Run the command in a process forked from the server, in a new process group and with output to ``log``."""
    os.setpgid(0, 0)
    with Path(log).open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch

    from mmtrain.cli.train import main as train

    # Otherwise a child of the fork server would start its data workers through another server, which survives a kill.
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    sys.exit(train(argv))


class Start:
    """One start of the command: a process that can be waited for and killed."""

    def __init__(self, path, log, *, workers, fork):
        argv = [str(path), "--cfg-options", f"train_dataloader.num_workers={workers}"]
        self.started_at = time.monotonic()
        if fork:
            context = multiprocessing.get_context("forkserver")
            self._process = context.Process(target=forked, args=(argv, str(log)))
            self._process.start()
            self._wait = lambda: self._process.exitcode
        else:
            with log.open("ab") as file:
                command = [sys.executable, str(TRAIN), *argv]
                self._process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
            self._wait = self._process.poll

    def status(self):
        """None while it runs, else its exit status; -9 if it was killed."""
        return self._wait()

    def wait(self, seconds, until=lambda: False):
        """Wait at most ``seconds``, until it ends or ``until()`` is true; returns the status."""
        deadline = time.monotonic() + seconds
        while self.status() is None and not until() and time.monotonic() < deadline:
            time.sleep(0.002)
        return self.status()

    def kill(self):
        self._process.kill()
        while self.status() is None:
            time.sleep(0.001)

    def outlived(self):
        """Whether a process of its group, such as a data worker, is still there after a while; kills the group."""
        deadline = time.monotonic() + WORKERS_LEAVE
        with contextlib.suppress(ProcessLookupError, PermissionError):
            while time.monotonic() < deadline:
                os.killpg(self._process.pid, 0)
                time.sleep(0.05)
            os.killpg(self._process.pid, signal.SIGKILL)
            return True
        return False


class Run:
    """One config: its uninterrupted run, and the one with kills."""

    def __init__(self, folder, *, seed, iters, fork):
        self.folder, self.fork = folder, fork
        self.rng = random.Random(seed)
        folder.mkdir(parents=True)
        about = {"seed": seed, "iters": iters, "accumulation": self.rng.choice([1, 2, 3])}
        self.uninterrupted, self.killed = (write_config(folder, name, **about) for name in NAMES)
        self.work_dir, self.phase = folder / "killed", folder / "killed.phase"
        self.kills, self.starts, self.skipped = Counter(), 0, 0
        self.lost = self.differs = None
        self.left_over, self.processes = [], []

    def go(self, budget):
        """Do both; ``budget()`` says before each kill whether to do one more."""
        try:
            self._go(budget)
        finally:
            self.outlived = sum(process.outlived() for process in self.processes)

    def _go(self, budget):
        log = self.folder / "uninterrupted.log"
        process = Start(self.uninterrupted, log, workers=0, fork=self.fork)
        self.processes.append(process)
        process.wait(HANGS, until=(self.folder / "uninterrupted.phase").exists)
        self.start_up = time.monotonic() - process.started_at
        if process.wait(HANGS) != 0:
            self.lost = f"the uninterrupted run ended with {process.status()}: {_tail(log)}"
            return
        self.span = (time.monotonic() - process.started_at) / 3
        while self.lost is None and not self._start(budget):
            pass
        if self.lost is None:
            self._compare()

    def _start(self, budget):
        """Start once, then kill it or wait for its end. Returns whether the run is complete."""
        self.phase.unlink(missing_ok=True)
        newest, log = self._newest(), self.folder / f"start-{self.starts:03d}.log"
        process = Start(self.killed, log, workers=self.rng.choice([0, 2]), fork=self.fork)
        self.processes.append(process)
        self.starts += 1
        after_step = self.starts % 2 == 0
        delay = self.rng.uniform(0, self.start_up * 2 if self.starts % 4 == 1 else self.span)
        if budget():
            if after_step and process.wait(HANGS, until=self.phase.exists) is None and not self.phase.exists():
                self.lost = f"start {self.starts} hung: {_tail(log)}"
            if process.wait(delay) is None:
                where = self._where()  # a moment before the kill
                process.kill()
                self.kills.update([where] if process.status() == -9 else [])
        elif process.wait(HANGS) is None:
            self.lost = f"start {self.starts} hung: {_tail(log)}"
        self._read(log, newest)
        if process.status() not in (None, 0, -9):
            self.lost = f"start {self.starts} ended with {process.status()}: {_tail(log)}"
        return process.status() == 0

    def _where(self):
        phase = self.phase.read_text() if self.phase.exists() else ""
        if not phase:
            return "start-up"
        names = " ".join(path.name for path in self.work_dir.iterdir() if path.name.startswith("."))
        doing = "deletion" if ".del-" in names else "save" if ".tmp-" in names else None
        return doing or ("validation" if phase == "v" else "training")

    def _newest(self):
        """The iteration of the newest complete checkpoint."""
        names = [path.parent.name for path in self.work_dir.glob("iter_*.pth/manifest.json")]
        return max((int(re.sub(r"\D", "", name)) for name in names), default=0)

    def _read(self, log, newest):
        """Read in the log of a start what it skipped and where it resumed."""
        text = log.read_text(errors="replace") if log.exists() else ""  # killed before it could open it
        self.skipped += text.count("Skipped a damaged checkpoint")
        resumed = re.search(r"Auto resumed from the latest checkpoint \S*iter_(\d+)\.pth", text)
        scratch = "starting from scratch" in text
        if (resumed and int(resumed[1]) < newest) or (scratch and newest):
            where = f"iteration {resumed[1]}" if resumed else "scratch"
            self.lost = f"start {self.starts} resumed from {where}, though iteration {newest} was complete"

    def _compare(self):
        from exactness import assert_same, left_behind

        beside = []
        for name in NAMES:
            hidden = [path.name for path in (self.folder / name).rglob(".*") if path.name != ".lock"]
            self.left_over += hidden if name == "killed" else []
            kept = sorted(path.name for path in (self.folder / name).glob("iter_*"))
            texts = [(self.folder / name / file).read_text() for file in ("last_checkpoint", "best.json")]
            beside.append({"kept": kept, "last_checkpoint": texts[0], "best.json": texts[1]})
        try:
            assert_same(*(left_behind(self.folder / name) for name in NAMES))
            assert_same(*beside)
        except AssertionError as error:
            self.differs = str(error).splitlines()[0] + f" {beside if beside[0] != beside[1] else ''}"


def _tail(log):
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1] if lines else "it wrote nothing"


# ---- all of them
class Soak:
    """Does runs in ``lanes`` threads, one after the other in each, until there were enough kills."""

    def __init__(self, options, folder):
        self.options, self.folder = options, folder
        self.lock, self.runs = threading.Lock(), []
        if options.fork:
            multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)

    def go(self):
        lanes = [threading.Thread(target=self._lane) for _ in range(self.options.lanes)]
        for lane in lanes:
            lane.start()
        for lane in lanes:
            lane.join()

    @property
    def kills(self):
        return sum(run.kills.total() for run in self.runs)

    def _lane(self):
        while True:
            with self.lock:
                if self.kills >= self.options.kills:
                    return
                number = len(self.runs)
                seed = self.options.seed * 100_000 + number
                place = self.folder / f"run-{number:04d}"
                run = Run(place, seed=seed, iters=self.options.iters, fork=self.options.fork)
                self.runs.append(run)
            try:
                run.go(lambda: self.kills < self.options.kills)
            except Exception as error:  # a broken lane must not look like a clean one
                run.lost = run.lost or f"the soak itself failed with {type(error).__name__}: {error}"
            self._report(run, number)

    def _report(self, run, number):
        verdict = f"LOST: {run.lost}" if run.lost else f"DIFFERS: {run.differs}" if run.differs else "identical"
        left = f", left over: {run.left_over}" if run.left_over else ""
        left += f", {run.outlived} starts whose processes outlived them" if run.outlived else ""
        kills = f"{run.kills.total()} kills, {run.starts} starts"
        print(f"run {number}: {kills}, {self.kills} in total, {verdict}{left}", file=sys.stderr, flush=True)
        if not run.lost and not run.differs:
            shutil.rmtree(run.folder)

    def figures(self):
        runs = self.runs
        return {
            "kills": self.kills, "runs": len(runs), "starts": sum(run.starts for run in runs),
            "lost": [f"{run.folder.name}: {run.lost}" for run in runs if run.lost],
            "differing": [f"{run.folder.name}: {run.differs}" for run in runs if run.differs],
            "checkpoints_skipped_as_bad": sum(run.skipped for run in runs),
            "left_over": sorted(f"{run.folder.name}: {name}" for run in runs for name in run.left_over),
            "processes_that_outlived": sum(run.outlived for run in runs),
            "kills_by_place": dict(sum((run.kills for run in runs), Counter())),
            "iterations_of_a_run": self.options.iters, "seed": self.options.seed,
            "started_by": "fork of a server" if self.options.fork else "exec",
        }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lanes", type=int, default=2, help="number of runs at the same time")
    parser.add_argument("--iters", type=int, default=600, help="iterations per run")
    parser.add_argument("--fork", action="store_true", default=True, help="fork each start from a server (default)")
    parser.add_argument("--exec", dest="fork", action="store_false", help="start `python tools/train.py` each time")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder if not given")
    parser.add_argument("--no-write", action="store_true", help="leave results/soak.json as it is")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-", dir=options.folder))
    started_at = time.monotonic()
    soak = Soak(options, folder)
    soak.go()
    figures = soak.figures() | {"minutes": round((time.monotonic() - started_at) / 60, 1)}
    for name, value in figures.items():
        print(f"{name:28}{len(value) if isinstance(value, list) else value}")
    failed = bool(figures["lost"] or figures["differing"])
    if failed:
        print(*figures["lost"], *figures["differing"], f"kept in {folder}", sep="\n")
    else:
        shutil.rmtree(folder)
    if not options.no_write:
        print(f"written to {write_result('soak', figures)}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
