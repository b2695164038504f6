"""A work directory that gives errors for a while: no save is reported that was not made, and the run continues."""

import contextlib
import errno
import json
import os
import threading

import pytest
from disturbed_saves import RETIRE
from exactness import assert_same, left_behind
from gone_disk import GoneDisk
from parts import make_runner
from saved_state import assert_holds, save

from mmtrain.checkpoint import CheckpointStore, LocalFiles
from mmtrain.errors import CheckpointError

CODES = [errno.EIO, errno.ESTALE, errno.EACCES]


class GoneAt(LocalFiles):
    """The disk goes away in the k-th call that changes it."""

    def __init__(self) -> None:
        self.disk, self.code, self.at, self.calls = None, 0, 0, 0

    def __getattribute__(self, name):
        if name in ("mkdir", "open", "write", "fsync", "close", "fsync_path", "rename", "unlink", "rmdir"):
            self.calls += 1
            if self.calls == self.at:
                self.disk.code = self.code
        return super().__getattribute__(name)

    def fsync(self, handle):  # not really, to be quick
        os.fstat(handle)

    def fsync_path(self, path):
        path.stat()


@contextlib.contextmanager
def store_of_two(root, files):
    store = CheckpointStore(root, fs=files, threads=1)
    save(store, 10), save(store, 20)
    yield store
    with contextlib.suppress(CheckpointError):
        store.close()


@pytest.mark.parametrize(("code", "blocking"), [(errno.EIO, True), (errno.EIO, False), (errno.EACCES, False)])
def test_a_disk_that_goes_away_in_any_call_of_a_save(tmp_path, monkeypatch, code, blocking):
    """The save is reported as failed or it is there, and the same store saves again once the disk is back."""
    files = GoneAt()
    files.disk = disk = GoneDisk(tmp_path, monkeypatch)
    with store_of_two(tmp_path / "count", files) as store:
        files.calls = 0
        save(store, 30, blocking=blocking, retire=RETIRE).wait()
        total = files.calls
    files.code = code
    failed = succeeded = 0
    for k in range(1, total + 1):
        files.at = 0
        with store_of_two(tmp_path / f"{k}", files) as store:
            files.calls, files.at = 0, k
            try:
                save(store, 30, blocking=blocking, retire=RETIRE).wait()
            except CheckpointError as error:
                failed += 1
                assert os.strerror(code) in str(error)
                saved = False
            else:
                succeeded += 1
                saved = True
            assert disk.code == code
            disk.code = files.at = 0
            if saved:
                assert_holds(store.open("iter_30.pth"), 30)
            assert_holds(store.newest_good()[0], 30 if saved or "iter_30.pth" in store.names() else 20)
            save(store, 40)
            assert_holds(store.newest_good()[0], 40)
            assert store.pointer() == "iter_40.pth"
    assert failed > 20
    assert succeeded > 5


@pytest.mark.parametrize("code", CODES)
def test_a_disk_that_is_gone_before_a_save(tmp_path, monkeypatch, code):
    disk = GoneDisk(tmp_path, monkeypatch)
    with store_of_two(tmp_path / "work", LocalFiles()) as store:
        disk.code = code
        for blocking in (True, False):
            with pytest.raises(CheckpointError, match=f"iter_30.pth was not saved: .*{os.strerror(code)}"):
                save(store, 30, blocking=blocking).wait()
        for look in (store.entries, store.newest_good, store.newest_entry):
            with pytest.raises(CheckpointError, match=f"work cannot be read: .*{os.strerror(code)}"):
                look()
        assert store.pointer() is None
        disk.code = 0
        save(store, 40).wait()
        assert store.names() == ["iter_10.pth", "iter_20.pth", "iter_40.pth"]


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), MemoryError(), ZeroDivisionError("x")])
def test_a_writer_that_ends_by_any_exception_is_a_failure(tmp_path, error):
    class Ends(LocalFiles):
        def write(self, handle, data):
            raise error

    store = CheckpointStore(tmp_path, fs=Ends())
    pending = save(store, 1, blocking=False)
    with pytest.raises(CheckpointError, match=r"iter_1\.pth was not saved: \S+"):
        pending.wait()
    assert store.names() == []
    store.close()


def test_a_writer_whose_clearing_up_fails_too_is_a_failure(tmp_path, monkeypatch):
    class Ends(LocalFiles):
        def open(self, path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        def rmdir(self, path):
            raise ZeroDivisionError

    store = CheckpointStore(tmp_path, fs=Ends())
    pending = save(store, 1, blocking=False)
    with pytest.raises(CheckpointError, match=os.strerror(errno.EIO)):
        pending.wait()
    store.close()


def test_a_save_without_a_thread_to_write_it_is_written_at_once(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    real = threading.Thread.start

    def start(self):
        if "save" in self.name:
            raise RuntimeError("can't start new thread")
        real(self)

    monkeypatch.setattr(threading.Thread, "start", start)
    pending = save(store, 1, blocking=False)
    assert pending.done
    assert_holds(store.open("iter_1.pth"), 1)
    store.close()


class Away:
    """Makes the disk go away after iteration ``first`` and come back after iteration ``last``."""

    priority = "LOWEST"

    def __init__(self, disk, code, first, last):
        self.disk, self.code, self.first, self.last = disk, code, first, last
        self.saved = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.first:
            runner.checkpointer.finish(runner)
            self.disk.code = self.code
        if runner.iter + 1 == self.last:
            runner.checkpointer.finish(runner)
            self.disk.code = 0

    def after_save_checkpoint(self, runner, entry):
        self.saved.append(entry)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
@pytest.mark.parametrize(("code", "async_save"), [(errno.EIO, True), (errno.ESTALE, True), (errno.EACCES, False)])
def test_a_run_continues_while_its_directory_is_away(tmp_path, monkeypatch, capfd, code, async_save):
    """Saves are due at 5, 10 (away) and 15: the failed one is reported, the logs are complete once it is back."""
    disk = GoneDisk(tmp_path / "run", monkeypatch)
    away = Away(disk, code, 8, 13)
    hook = {"type": "CheckpointHook", "interval": 5, "async_save": async_save, "weights_interval": 10}
    backends = {"type": "Visualizer", "vis_backends": [{"type": "TensorboardVisBackend"}]}
    options = {
        "default_hooks": {"checkpoint": hook | {"save_best": "loss"}},
        "train_cfg": {"max_iters": 20, "val_interval": 5},
        "visualizer": backends,
    }
    make_runner(tmp_path / "uninterrupted", **options).train()
    capfd.readouterr()
    make_runner(tmp_path / "run", custom_hooks=[away], **options).train()
    assert disk.calls > 4
    assert away.saved == ["iter_5.pth", "iter_15.pth", "iter_20.pth"]
    assert json.loads((tmp_path / "run" / "best.json").read_text())["loss"]["checkpoint"] in away.saved
    printed = capfd.readouterr().err
    assert f"checkpoint iter_10.pth could not be written: [Errno {code}]" in printed
    assert printed.count("TensorboardVisBackend cannot write") == 1
    found = left_behind(tmp_path / "run")
    assert_same(left_behind(tmp_path / "uninterrupted") | {"state": None}, found | {"state": None})
