"""Signals, kills and locks, with the real command in real processes."""

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


def write_config(folder, name, **changes):
    cfg = config(Path(folder) / name, log_level="INFO", **changes)
    path = Path(folder) / f"{name}.py"
    lines = [f"{key} = {value!r}\n" for key, value in cfg.items()]
    path.write_text("custom_imports = dict(imports=['parts'])\n" + "".join(lines))
    return path


def start(path, *options):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "train.py"), str(path), *options],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def errors_of(process):
    """What a process wrote to stderr, once it has ended."""
    try:
        return process.communicate(timeout=300)[1]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def run(path, *options):
    process = start(path, *options)
    errors = errors_of(process)
    return process.returncode, errors


LONG = {"train_cfg": {"max_iters": 30}, "optim_wrapper": {"accumulative_counts": 3}}


def with_signal(folder, name, number, iteration):
    hook = {"type": "SignalAt", "iteration": iteration, "number": int(number), "marker": str(Path(folder) / "marker")}
    return write_config(folder, name, custom_hooks=[hook], resume=True, **LONG)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """What an uninterrupted run leaves."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    status, errors = run(write_config(folder, "uninterrupted", **LONG))
    assert status == 0, errors
    return left_behind(folder / "uninterrupted")


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130), (signal.SIGKILL, -9)]
)
def test_a_signal_then_the_same_command_again(uninterrupted, tmp_path, number, status):
    path = with_signal(tmp_path, "broken", number, 16)
    left, errors = run(path)
    assert left == status, errors
    assert "Traceback" not in errors
    if number != signal.SIGKILL:
        # Saved at the end of the window, which is the next multiple of three.
        assert (tmp_path / "broken" / "iter_18.pth" / "manifest.json").exists()
        assert f"{signal.Signals(number).name} received" in errors
    left, errors = run(path)
    assert left == 0, errors
    assert "Auto resumed from the latest checkpoint" in errors
    assert_same(uninterrupted, left_behind(tmp_path / "broken"))


def test_workers_that_outlive_a_killed_parent_do_not_hold_the_lock(uninterrupted, tmp_path):
    path = with_signal(tmp_path, "broken", signal.SIGKILL, 16)
    path.write_text(path.read_text() + "train_dataloader['num_workers'] = 2\n")
    assert run(path)[0] == -9
    status, errors = run(path)
    assert status == 0, errors
    assert_same(uninterrupted, left_behind(tmp_path / "broken"))


@pytest.mark.skipif(sys.platform != "linux", reason="workers of a fork server notice a killed run by pidfd, on Linux")
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_end_after_a_killed_parent(tmp_path, method):
    path = with_signal(tmp_path, "broken", signal.SIGKILL, 16)
    path.write_text(path.read_text() + f"train_dataloader.update(num_workers=2, multiprocessing_context='{method}')\n")
    process = start(path)
    process.wait()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        os.sched_yield()
    else:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail("processes of the killed run are still there after 120 seconds")
    process.stderr.close()


def test_a_signal_to_the_process_group_also_reaches_the_workers(uninterrupted, tmp_path):
    """What Ctrl-C in a terminal does, and scancel."""
    path = with_signal(tmp_path, "broken", signal.SIGUSR2, 16)
    path.write_text(path.read_text() + "train_dataloader['num_workers'] = 2\n")
    path.write_text(path.read_text().replace("'SignalAt'", "'GroupSignalAt'"))
    status, errors = run(path)
    assert status == 75, errors
    assert "Traceback" not in errors
    status, errors = run(path)
    assert status == 0, errors
    assert_same(uninterrupted, left_behind(tmp_path / "broken"))


def test_a_second_run_in_the_same_work_dir_is_refused(tmp_path):
    held = write_config(tmp_path, "same", custom_hooks=[{"type": "Wait", "marker": str(tmp_path / "go")}], **LONG)
    first = start(held)
    for line in first.stderr:
        if "waiting" in line:
            break
    status, errors = run(write_config(tmp_path, "same", **LONG))
    (tmp_path / "go").touch()
    rest = errors_of(first)
    assert first.returncode == 0, rest
    assert status == 1
    assert f"process {first.pid} on " in errors.splitlines()[-1]


def test_ctrl_c_before_training(tmp_path):
    path = write_config(tmp_path, "early", **LONG)
    path.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n" + path.read_text())
    status, errors = run(path)
    assert status == 130
    assert "Traceback" not in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_training_exits_with_status_75(tmp_path, number):
    path = write_config(tmp_path, "early", **LONG)
    path.write_text(f"import os, signal\nos.kill(os.getpid(), {int(number)})\n" + path.read_text())
    status, errors = run(path)
    assert status == 75
    assert errors == f"{number.name} received before training began; nothing to save\n"


def test_an_out_dir_is_locked_like_the_work_dir(tmp_path):
    """Two runs of one name in two work dirs: their checkpoints would be in the same directory."""
    hook = {"default_hooks": {"checkpoint": {"type": "CheckpointHook", "out_dir": str(tmp_path / "saved")}}}
    wait = [{"type": "Wait", "marker": str(tmp_path / "go")}]
    (tmp_path / "other").mkdir()
    first = start(write_config(tmp_path, "same", custom_hooks=wait, **hook, **LONG))
    for line in first.stderr:
        if "waiting" in line:
            break
    status, errors = run(write_config(tmp_path / "other", "same", **hook, **LONG))
    (tmp_path / "go").touch()
    rest = errors_of(first)
    assert first.returncode == 0, rest
    assert status == 1
    assert f"{tmp_path / 'saved' / 'same'} is in use by process {first.pid} on " in errors.splitlines()[-1]


def test_an_out_dir_may_contain_the_work_dir_and_must_be_writable(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    hook = {"type": "CheckpointHook", "out_dir": str(tmp_path / "link")}
    status, errors = run(write_config(tmp_path, "same", default_hooks={"checkpoint": hook}, **LONG))
    assert status == 0, errors
    assert (tmp_path / "same" / "last_checkpoint").exists()
    (tmp_path / "file").touch()
    hook["out_dir"] = str(tmp_path / "file")
    status, errors = run(write_config(tmp_path, "same", default_hooks={"checkpoint": hook}, **LONG))
    assert status == 2
    assert f"out_dir '{tmp_path / 'file' / 'same'}' is not writable" in errors.splitlines()[-1]
