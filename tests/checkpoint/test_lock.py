import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap

import pytest

from mmtrain.checkpoint import WorkDirLock, lock
from mmtrain.errors import RunError

HOLDER = """
    import os, sys
    from mmtrain.checkpoint.lock import WorkDirLock
    WorkDirLock(sys.argv[1]).acquire()
    if len(sys.argv) > 2:  # a data worker, forked after the lock was taken
        ready, tell = os.pipe()
        if os.fork() == 0:
            os.write(tell, b"x")
            sys.stdin.buffer.raw.read(1)
            os._exit(0)
        os.read(ready, 1)
    print(os.getpid(), flush=True)
    sys.stdin.buffer.raw.read(1)
"""


def hold(work_dir, *options):
    """Start a process that holds the lock until a byte comes in."""
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(work_dir), *options]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert int(process.stdout.readline()) == process.pid
    return process


def end(process):
    process.stdin.close()
    process.stdout.close()
    process.wait()


def test_a_second_run_is_refused_and_the_holder_is_named(tmp_path):
    holder = hold(tmp_path)
    message = rf"is in use by process {holder.pid} on {re.escape(socket.gethostname())}, since .*another work_dir"
    with pytest.raises(RunError, match=message):
        WorkDirLock(tmp_path).acquire(wait_seconds=0.1)
    end(holder)
    with WorkDirLock(tmp_path) as held:
        assert held.held


def test_a_killed_run_leaves_no_lock_while_its_worker_still_runs(tmp_path):
    holder = hold(tmp_path, "with a worker")
    with pytest.raises(RunError):
        WorkDirLock(tmp_path).acquire(wait_seconds=0)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert not holder.stdout.read(0)  # the worker is still running: it has the pipes
    mine = WorkDirLock(tmp_path).acquire(wait_seconds=0)
    mine.release()
    end(holder)


def test_a_run_that_is_about_to_end_is_waited_for(tmp_path):
    holder = hold(tmp_path)
    holder.send_signal(signal.SIGKILL)  # without waiting for it, as when the same command is started again at once
    WorkDirLock(tmp_path).acquire(wait_seconds=20).release()
    end(holder)


def test_a_second_lock_in_one_process_is_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    first = WorkDirLock(tmp_path).acquire()
    with pytest.raises(RunError, match=f"in this process \\(pid {os.getpid()}\\)"):
        WorkDirLock(tmp_path / "link").acquire()
    first.release()
    first.release()
    with WorkDirLock(tmp_path):
        pass


def test_the_file_names_the_holder(tmp_path):
    with WorkDirLock(tmp_path):
        record = json.loads(
            (tmp_path / ".lock").read_text()
        )  # reading it in this process drops the lock, which is fine in a test
        assert (record["pid"], record["host"]) == (os.getpid(), socket.gethostname())
    assert (tmp_path / ".lock").read_text() == ""


def test_without_locks_in_the_file_system_a_running_holder_counts(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", refuse)
    holder = hold(tmp_path)
    with pytest.raises(RunError, match=f"process {holder.pid} on"):
        WorkDirLock(tmp_path).acquire(wait_seconds=0)
    holder.send_signal(signal.SIGKILL)
    end(holder)
    WorkDirLock(tmp_path).acquire(wait_seconds=0).release()


def test_a_read_only_directory_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        WorkDirLock(tmp_path / "file" / "work").acquire()


@pytest.mark.parametrize("kind", ["symlink_to", "hardlink_to"])
def test_a_lock_that_leads_to_another_file_is_refused_and_that_file_stays(tmp_path, kind):
    victim = tmp_path / "notes.txt"
    victim.write_text("precious")
    getattr(tmp_path / ".lock", kind)(victim)
    with pytest.raises(RunError, match=r"\.lock cannot be used as the lock .* link.*delete"):
        WorkDirLock(tmp_path).acquire(wait_seconds=0)
    assert victim.read_text() == "precious"


def test_a_pipe_in_place_of_the_lock_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(RunError, match="it is a named pipe"):
        WorkDirLock(tmp_path).acquire(wait_seconds=0)


def test_a_disk_that_fails_while_the_lock_is_released(tmp_path, monkeypatch):
    held = WorkDirLock(tmp_path).acquire()
    real = os.close

    def close(handle):
        real(handle)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(os, "close", close)
        held.release()
    assert not held.held
    WorkDirLock(tmp_path).acquire(wait_seconds=0).release()


def assert_held_by_this_process(work):
    refused = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(HOLDER), str(work)], stdin=subprocess.DEVNULL, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert f"is in use by process {os.getpid()}" in refused.stderr


@pytest.mark.parametrize("how", ["delete", "move", "lock only"])
def test_a_directory_that_was_deleted_is_locked_again(tmp_path, how):
    work = tmp_path / "work"
    held = WorkDirLock(work).acquire()
    assert held.renew() == ""
    if how == "delete":
        shutil.rmtree(work)
    elif how == "move":
        work.rename(tmp_path / "moved")
    else:
        (work / ".lock").unlink()
    assert "was deleted or replaced" in held.renew()
    assert held.renew() == ""
    assert_held_by_this_process(work)
    held.release()
    WorkDirLock(work).acquire(wait_seconds=0).release()


def test_a_directory_that_was_deleted_and_belongs_to_another_run_now(tmp_path):
    work = tmp_path / "work"
    held = WorkDirLock(work).acquire()
    shutil.rmtree(work)
    other = hold(work)
    for _ in range(2):
        with pytest.raises(RunError, match=f"was deleted .* in use by process {other.pid} .* This run ends"):
            held.renew()
    held.release()
    with pytest.raises(RunError, match=f"process {other.pid}"):
        WorkDirLock(work).acquire(wait_seconds=0)
    end(other)


def test_a_file_system_whose_file_numbers_change_keeps_the_lock(tmp_path, monkeypatch):
    held = WorkDirLock(tmp_path).acquire()
    with monkeypatch.context() as patched:
        patched.setattr(os.path, "samestat", lambda *_: False)
        assert held.renew()
    assert_held_by_this_process(tmp_path)
    held.release()
