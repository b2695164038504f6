"""Which checkpoints a directory holds."""

import errno
import os

import pytest
from saved_state import save

from mmtrain.checkpoint import CheckpointStore, Retention, RetirePolicy
from mmtrain.checkpoint.discover import newest_good, scan


@pytest.fixture
def store(tmp_path):
    store = CheckpointStore(tmp_path / "work")
    for iteration in (1, 2):
        save(store, iteration)
    yield store
    store.close()


@pytest.mark.parametrize("name", ["latest.pth", "iter_7.pth"])
def test_a_link_to_a_neighbour_is_not_another_checkpoint(store, name):
    (store.root / name).symlink_to("iter_2.pth")
    assert store.names() == ["iter_1.pth", "iter_2.pth"]
    assert newest_good(store.root, verify="full")[0].name == "iter_2.pth"
    store.prune(RetirePolicy(Retention(max_keep_ckpts=1)))
    assert store.names() == ["iter_2.pth"]


def test_a_link_to_a_checkpoint_elsewhere_counts(store, tmp_path):
    (store.root / "iter_2.pth").rename(tmp_path / "other_disk")
    (store.root / "iter_2.pth").symlink_to(tmp_path / "other_disk")
    assert store.names() == ["iter_1.pth", "iter_2.pth"]


def test_unreadable_directories_are_skipped(store, monkeypatch):
    stat = os.stat

    def refuse(path, **options):
        if "lost+found/" in str(path) or "iter_2.pth/" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **options)

    (store.root / "lost+found").mkdir()
    (store.root / "iter_2.pth" / "manifest.json").unlink()
    monkeypatch.setattr(os, "stat", refuse)
    entries, problems = scan(store.root, verify="none")
    assert ([entry.name for entry in entries], len(problems)) == (["iter_1.pth"], 1)
    assert newest_good(store.root, verify="none")[0].name == "iter_1.pth"
