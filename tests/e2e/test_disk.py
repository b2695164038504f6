"""A disk that becomes full, unwritable or unmounted during a run of the real command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from exactness import assert_same, left_behind
from parts import config

ROOT = Path(__file__).resolve().parents[2]
MOUNT = "mkdir -p {0} && unshare -m mount -t tmpfs tmpfs {0}"


@pytest.fixture(autouse=True)
def _may_mount(tmp_path):
    if subprocess.run(MOUNT.format(tmp_path / "try"), shell=True, capture_output=True, check=False).returncode:
        pytest.skip("this process is not allowed to mount a file system")


def run(tmp_path, script, *, size="3m", **changes):
    """Run ``script`` in a new mount namespace with a small disk at ``tmp_path/disk``."""
    disk = tmp_path / "disk"
    disk.mkdir()
    cfg = config(disk / "run", log_level="INFO", resume=True, custom_imports={"imports": ["parts", "disk_parts"]})
    cfg |= changes
    path = tmp_path / "cfg.py"
    path.write_text("".join(f"{key} = {value!r}\n" for key, value in cfg.items()))
    train = f"{sys.executable} {ROOT / 'tools' / 'train.py'} {path}"
    lines = [
        "set -u",
        f"mount -t tmpfs -o size={size} tmpfs {disk}",
        f"cd {tmp_path}",
        script.format(train=train, disk=disk),
    ]
    paths = os.pathsep.join([str(ROOT / "tests"), str(Path(__file__).parent)])
    return subprocess.run(
        ["unshare", "-m", "bash", "-c", "\n".join(lines)], text=True, capture_output=True, check=False,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def hooks(*commands):
    return [{"type": "ShellAt", "iteration": iteration, "command": command} for iteration, command in commands]


def uninterrupted(tmp_path):
    from parts import make_runner

    make_runner(tmp_path / "uninterrupted").train()
    return left_behind(tmp_path / "uninterrupted")


def test_saving_continues_after_a_full_disk_is_freed(tmp_path):
    """For a third of the run nothing can be written, including logs; then there is room again."""
    fill = f"head -c 9m /dev/zero > {tmp_path}/disk/filler; true"
    done = run(
        tmp_path, "{train}; status=$?; cp -a {disk}/run {disk}/../copy; exit $status",
        custom_hooks=hooks((6, fill), (13, f"rm {tmp_path}/disk/filler")),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "(train)" in line or "checkpoint" in line]
    failed = "iter_7.pth could not be written: [Errno 28] No space left on device"
    failure = lines[next(at for at, line in enumerate(lines) if failed in line) :]
    failure = failure[: next(at for at, line in enumerate(failure) if "Saved checkpoint" in line)]
    reports = [line for line in failure if "(train)" in line]
    assert any("[14/20]" in line for line in reports)  # the failure was known at iteration 13 at the latest
    assert len(failure) == 1 + 2 * len(reports)  # at once, and after each line until a save succeeded
    assert "Traceback" not in done.stderr
    assert "Logging error" not in done.stderr
    names = {path.name for path in (tmp_path / "copy").iterdir() if not path.name.startswith("20")}
    assert names == {"iter_14.pth", "iter_20.pth", "last_checkpoint", ".lock"}
    assert_same(uninterrupted(tmp_path), left_behind(tmp_path / "copy"))


@pytest.mark.slow
def test_a_disk_that_stays_full_fails_the_run_and_a_resume_completes_it(tmp_path):
    fill = f"head -c 9m /dev/zero > {tmp_path}/disk/filler; true"
    done = run(
        tmp_path,
        "{train}; first=$?; ls {disk}/run >&2; rm {disk}/filler; touch {disk}/freed; {train}; second=$?; "
        "cp -a {disk}/run {disk}/../copy; exit $((10 * first + second))",
        custom_hooks=hooks((16, f"test -e {tmp_path}/disk/freed || {fill}")),
    )
    assert done.returncode == 10, done.stderr
    assert "the run ended without its last checkpoint: checkpoint iter_20.pth could not be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert_same(uninterrupted(tmp_path), left_behind(tmp_path / "copy"))


@pytest.mark.parametrize("mode", [pytest.param("ro", marks=pytest.mark.slow), "gone"])
def test_a_disk_that_is_unwritable_for_a_while(tmp_path, mode):
    """The disk is read-only or unmounted: older checkpoints are untouched, and nothing is written elsewhere."""
    disk, away = tmp_path / "disk", tmp_path / "away"
    commands = {
        "ro": ((9, f"mount --bind {disk} {disk}; mount -o remount,bind,ro {disk}"), (17, f"umount {disk}")),
        "gone": ((9, f"mkdir {away}; mount --move {disk} {away}"), (17, f"mount --move {away} {disk}")),
    }[mode]
    done = run(
        tmp_path, "{train}; status=$?; cp -a {disk}/run {disk}/../copy; exit $status",
        custom_hooks=hooks(*commands),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    cause = {"ro": "Read-only file system", "gone": "is on another disk than at the start"}[mode]
    assert "iter_14.pth could not be written: " in done.stderr
    assert cause in done.stderr
    assert "Traceback" not in done.stderr
    names = {path.name for path in (tmp_path / "copy").iterdir() if not path.name.startswith("20")}
    assert names == {"iter_7.pth", "iter_20.pth", "last_checkpoint", ".lock"}
    assert list(disk.iterdir()) == []
    assert_same(uninterrupted(tmp_path), left_behind(tmp_path / "copy"))
