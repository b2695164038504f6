import os
import subprocess
import sys

import pytest
from saved_state import assert_holds, hidden, save

from mmtrain.checkpoint import CheckpointStore, process_identity
from mmtrain.checkpoint.write import storage
from mmtrain.checkpoint.write.storage import Transaction, recover
from mmtrain.files import LocalFiles, write_new


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, data[:3]))
    files = LocalFiles()
    write_new(tmp_path / "f", b"0123456789", files)
    assert (tmp_path / "f").read_bytes() == b"0123456789"


def test_an_existing_file_is_never_overwritten(tmp_path):
    (tmp_path / "f").write_text("x")
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "f", b"y", LocalFiles())


def test_links_are_removed_not_followed(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "f").write_text("x")
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "link").symlink_to(tmp_path / "kept")
    storage.remove_tree(tmp_path / "gone", LocalFiles())
    assert (tmp_path / "kept" / "f").exists()
    assert not (tmp_path / "gone").exists()


def test_the_pointer_is_relative_and_only_a_hint(tmp_path):
    assert storage.read_pointer(tmp_path) is None
    storage.write_pointer(tmp_path, "iter_3.pth", LocalFiles())
    assert (tmp_path / "last_checkpoint").read_text() == "iter_3.pth"
    (tmp_path / "last_checkpoint").write_bytes(b"\xff\xfe")
    assert storage.read_pointer(tmp_path) is None


def token_of(pid: int, started: int) -> str:
    host, boot, *_ = process_identity.new_token().split("-")
    return f"{host}-{boot}-{pid}-{started}-00000000"


def leftovers(root, token):
    for kind in ("tmp", "del"):
        (root / f".iter_9.pth.{kind}-{token}").mkdir(parents=True)
        (root / f".iter_9.pth.{kind}-{token}" / "file").write_text("x")
    return hidden(root)


def test_leftovers_of_ended_processes_are_removed_and_of_running_ones_kept(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    token = token_of(child.pid, process_identity.start_time(child.pid))
    names = leftovers(tmp_path, token)
    assert recover(tmp_path, LocalFiles()) == []
    assert hidden(tmp_path) == names
    child.communicate(b"\n")
    notices = recover(tmp_path, LocalFiles())
    assert len(notices) == 2
    assert hidden(tmp_path) == []


def test_a_reused_process_id_is_not_taken_for_the_owner(tmp_path):
    leftovers(tmp_path, token_of(os.getppid(), 1))
    recover(tmp_path, LocalFiles())
    assert hidden(tmp_path) == []


def test_another_machines_leftovers_are_kept_unless_the_lock_is_held(tmp_path):
    names = leftovers(tmp_path, "0badcafe-00000000-1-1-00000000")
    recover(tmp_path, LocalFiles())
    assert hidden(tmp_path) == names
    recover(tmp_path, LocalFiles(), exclusive=True)
    assert hidden(tmp_path) == []


def test_other_hidden_files_are_kept(tmp_path):
    for name in (".git", ".lock", ".iter_3.pth.tmp-mine", "iter_3.pth.tmp-1"):
        (tmp_path / name).mkdir()
    assert recover(tmp_path, LocalFiles(), exclusive=True) == []
    assert len(list(tmp_path.iterdir())) == 4


def test_a_checkpoint_that_was_being_replaced_is_put_back(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 5)
    (tmp_path / "iter_5.pth").rename(tmp_path / f".iter_5.pth.old-{process_identity.new_token()}")
    assert store.names() == []
    checkpoint, problems = store.newest_good()
    assert problems == []
    assert_holds(checkpoint, 5)
    store.close()


def test_leftovers_that_cannot_be_removed_give_a_notice(tmp_path):
    class ReadOnly(LocalFiles):
        def unlink(self, path):
            raise PermissionError(13, "Permission denied", str(path))

    leftovers(tmp_path, token_of(os.getppid(), 1))
    notices = recover(tmp_path, ReadOnly())
    assert len(notices) == 2
    assert all("could not be removed" in notice for notice in notices)


def test_the_work_directory_is_created(tmp_path):
    transaction = Transaction(tmp_path / "a" / "b", "iter_1.pth", LocalFiles())
    transaction.begin()
    assert transaction.directory.parent == tmp_path / "a" / "b"
    assert transaction.abort() == []
    assert transaction.abort() == []
    assert list((tmp_path / "a" / "b").iterdir()) == []
