"""A work directory that gives errors for a while: no save is reported that was not made, and the run continues."""

import contextlib
import errno
import os
import threading

import pytest
from disturbed_saves import RETIRE
from gone_disk import GoneDisk
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


@contextlib.contextmanager
def store_of_two(root, files):
    store = CheckpointStore(root, fs=files, threads=1)
    save(store, 10), save(store, 20)
    yield store
    with contextlib.suppress(CheckpointError):
        store.close()


@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.parametrize("code", CODES)
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
