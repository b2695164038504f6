"""A run is killed, or its disk fails, in any call of any of its saves: the next start ends as if nothing had happened."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from exactness import assert_same, left_behind

HERE = Path(__file__).resolve().parent
EVERY_SAVE = [f"iter_{iteration}.pth" for iteration in (3, 4, 6, 8, 9, 12, 14)]


class Runs:
    """The process whose children train; it has imported what they need."""

    def __init__(self, *, asynchronous: bool) -> None:
        paths = [str(HERE), str(HERE.parent)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "FAULT_ASYNC": str(int(asynchronous))}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "faulty_runs_program.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def train(self, work_dir: Path, mode: str = "none", k: int = 0) -> int:
        self.process.stdin.write(f"{work_dir} {mode} {k}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        assert self.process.wait() == 0
        self.process.stdout.close()


@pytest.fixture(scope="module", params=[False, True], ids=["sync", "async"])
def undisturbed(request, tmp_path_factory):
    """The process, what an uninterrupted run leaves behind, and how many calls its saves took."""
    runs = Runs(asynchronous=request.param)
    uninterrupted = tmp_path_factory.mktemp("runs") / "uninterrupted"
    assert runs.train(uninterrupted) == 0
    yield runs, everything(uninterrupted), int(uninterrupted.with_suffix(".calls").read_text())
    runs.close()


def everything(work_dir: Path) -> dict:
    """What the run leaves behind: the values to compare, and what is in the directory."""
    names = sorted(path.name for path in work_dir.iterdir() if not path.name.startswith("20"))
    weights = {path.name: path.read_bytes() if path.is_file() else None for path in (work_dir / "weights").iterdir()}
    best = (work_dir / "best.json").read_text()
    return {**left_behind(work_dir), "names": names, "weights": weights, "best": best}


def check(uninterrupted: dict, work_dir: Path, mode: str, where: str) -> None:
    """After a kill everything is as in the uninterrupted run; the file of a failed save is missing."""
    found = everything(work_dir)
    if mode != "kill":
        assert set(found["names"]) <= {*uninterrupted["names"], *EVERY_SAVE}, where
        assert set(json.loads(found["best"])["accuracy"]["checkpoint"].split()) <= set(found["names"]), where
        written = {name: data for name, data in found["weights"].items() if not name.startswith(".")}
        assert written.items() <= uninterrupted["weights"].items(), (
            where
        )  # a directory that could not be removed may stay
        for changed in ("names", "best", "weights"):
            found[changed] = uninterrupted[changed]
        found["state"]["best"] = uninterrupted["state"]["best"]
    assert_same(uninterrupted, found, where)


def sweep(undisturbed, tmp_path: Path, mode: str, *, every: int, first: int = 1) -> None:
    runs, uninterrupted, calls = undisturbed
    assert calls > 150
    for k in range(first, calls + 1, every):
        work_dir = tmp_path / "run"
        status = runs.train(work_dir, mode, k)
        assert status in ((-9,) if mode == "kill" else (0, 1)), f"call {k}"  # 1 where the last save failed
        assert runs.train(work_dir) == 0, f"the start after call {k}"
        check(uninterrupted, work_dir, mode, f"call {k}")
        shutil.rmtree(work_dir)


@pytest.mark.parametrize(("mode", "first"), [("kill", 3), ("ENOSPC", 7), ("EIO", 11)])
def test_a_fault_in_some_calls_of_a_run(undisturbed, tmp_path, mode, first):
    sweep(undisturbed, tmp_path, mode, every=41, first=first)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["kill", "ENOSPC", "EIO"])
def test_a_fault_in_every_call_of_a_run(undisturbed, tmp_path, mode):
    sweep(undisturbed, tmp_path, mode, every=1)
