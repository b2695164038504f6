"""A signal while a batch is awaited: saved and left at once, however long the batch would take."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from exactness import assert_same, left_behind
from parts import config

ROOT = Path(__file__).resolve().parents[2]
SOON = 120  # seconds; a sample takes 300


def write_config(folder, name, *, block_at=None, **changes):
    hooks = [] if block_at is None else [{"type": "BlockAt", "iteration": block_at, "folder": str(folder)}]
    cfg = config(folder / name, log_level="INFO", resume=True, custom_hooks=hooks, **changes)
    path = folder / f"{name}.py"
    lines = [f"{key} = {value!r}\n" for key, value in cfg.items()]
    path.write_text("custom_imports = dict(imports=['parts'])\n" + "".join(lines))
    return path


def start(path):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "train.py"), str(path)],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
             "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def end(process, seconds=SOON):
    """Return the status and what was written, within a time that is far less than a sample takes."""
    try:
        errors = process.communicate(timeout=seconds)[1]
        return process.returncode, errors
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def data(folder, **options):
    dataset = {"type": "StuckPoints", "folder": str(folder)}
    return {"dataset": dataset | {key: options.pop(key) for key in ("number",) if key in options}, **options}


def blocked(folder, process):
    while not (folder / "blocked").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("number", "status", "num_workers", "counts"),
    [(signal.SIGTERM, 75, 0, 1), (signal.SIGINT, 130, 2, 1), (signal.SIGINT, 130, 0, 3)],
)
def test_a_run_that_waits_for_a_batch_saves_and_leaves_at_once(tmp_path, number, status, num_workers, counts):
    """In the main process the signal comes while a sample is read there, at the end of a window."""
    folder, accumulative = tmp_path, {"accumulative_counts": counts}
    whole = write_config(folder, "whole", train_dataloader=data(folder), optim_wrapper=accumulative)
    left, errors = end(start(whole))
    assert left == 0, errors
    ahead = {"num_workers": num_workers, "prefetch_factor": 1} if num_workers else {}
    path = write_config(
        folder, "run", block_at=12, optim_wrapper=accumulative,
        train_dataloader=data(folder, number=int(number), **ahead),
    )  # fmt: skip
    process = start(path)
    if num_workers:
        blocked(folder, process)
        process.send_signal(number)
    began = time.monotonic()
    left, errors = end(process)
    assert left == status, errors
    assert time.monotonic() - began < SOON
    assert f"{number.name} received: saving after this update and leaving" in errors
    assert "Traceback" not in errors
    (name,) = {child.name for child in (folder / "run").glob("iter_1[2-9].pth")}
    if num_workers == 0:
        assert name == "iter_12.pth"
    assert (folder / "run" / name / "manifest.json").exists()
    (folder / "block").unlink()
    left, errors = end(start(path))
    assert left == 0, errors
    assert name in errors
    assert_same(left_behind(folder / "whole"), left_behind(folder / "run"))


def test_a_run_that_waits_for_its_first_batch_leaves_without_a_checkpoint(tmp_path):
    path = write_config(tmp_path, "run", train_dataloader=data(tmp_path))
    (tmp_path / "block").touch()
    left, errors = end(start(path))
    assert left == 75, errors
    assert "Nothing to save: no update since iteration 0" in errors
    assert list((tmp_path / "run").glob("*.pth")) == []


def test_a_position_that_is_saved_already_is_not_saved_again(tmp_path):
    path = write_config(tmp_path, "run", block_at=7, train_dataloader=data(tmp_path))  # a checkpoint every 7 iterations
    left, errors = end(start(path))
    assert left == 75, errors
    assert "Nothing to save: no update since iteration 7" in errors
    assert errors.count("Saved checkpoint") == 1


def test_workers_of_all_loaders_that_are_stuck_end_together(tmp_path):
    """16 workers in samples of five minutes: one deadline for all."""
    path = write_config(
        tmp_path, "run", block_at=12,
        train_dataloader=data(tmp_path, num_workers=16, prefetch_factor=1),
    )  # fmt: skip
    process = start(path)
    blocked(tmp_path, process)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    left, errors = end(process)
    assert left == 75, errors
    assert time.monotonic() - began < 60
