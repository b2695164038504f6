import contextlib
import shutil

import pytest
from saved_state import save

from mmtrain.checkpoint import CheckpointStore, Retention, RetirePolicy, discover
from mmtrain.checkpoint.inventory import Inventory


@pytest.fixture
def store(tmp_path):
    with contextlib.closing(CheckpointStore(tmp_path / "work")) as made:
        for iteration in (1, 2, 3, 4):
            save(made, iteration)
        yield made


@pytest.fixture
def reads(monkeypatch):
    """The names of the checkpoints whose manifest was read."""
    names = []
    inspect = discover.inspect
    monkeypatch.setattr(
        discover, "inspect", lambda path, **options: names.append(path.name) or inspect(path, **options)
    )
    return names


def keep(count, **options):
    return RetirePolicy(Retention(max_keep_ckpts=count, **options))


def test_it_finds_what_a_scan_finds(store):
    (store.root / "20260101_000000" / "vis_data").mkdir(parents=True)
    (store.root / "iter_9.pth").mkdir()
    (store.root / "latest.pth").symlink_to("iter_4.pth")
    (store.root / "iter_3.pth" / "state.json").unlink()
    shutil.copytree(store.root / "iter_2.pth", store.root / "before_change")
    inventory = Inventory(store.root)
    assert inventory.entries() == discover.scan(store.root)[0]
    assert [entry.name for entry in inventory.entries()] == ["iter_1.pth", "before_change", "iter_2.pth", "iter_4.pth"]


def test_each_is_read_once(store, reads):
    inventory = Inventory(store.root)
    inventory.entries()
    assert sorted(reads) == ["iter_1.pth", "iter_2.pth", "iter_3.pth", "iter_4.pth"]
    reads.clear()
    assert len(inventory.entries()) == 4
    assert inventory.names_to_delete(keep(-1)) == []
    assert reads == []
    save(store, 5)
    assert len(inventory.entries()) == 5
    assert reads == ["iter_5.pth"]


def test_a_save_reads_what_its_decision_rests_on_however_many_there_are(tmp_path, reads):
    with contextlib.closing(CheckpointStore(tmp_path / "work")) as store:
        counts = []
        for iteration in range(1, 31):
            reads.clear()
            save(store, iteration, retire=keep(3, keep_every=2))
            counts.append(len(reads))
        assert max(counts[20:]) == max(counts[5:10]) <= 8
        assert store.names()[-3:] == ["iter_28.pth", "iter_29.pth", "iter_30.pth"]


def test_what_other_processes_do_is_seen(store):
    inventory = Inventory(store.root)
    inventory.entries()
    shutil.rmtree(store.root / "iter_1.pth")
    shutil.copytree(store.root / "iter_4.pth", store.root / "iter_2.new")
    shutil.rmtree(store.root / "iter_2.pth")
    (store.root / "iter_2.new").rename(store.root / "iter_2.pth")
    assert inventory.entries() == discover.scan(store.root)[0]
    shutil.rmtree(store.root)
    assert inventory.entries() == []


def test_one_that_was_damaged_meanwhile_does_not_count(store):
    inventory = Inventory(store.root)
    inventory.entries()
    next((store.root / "iter_3.pth" / "model").glob("*")).unlink()
    assert inventory.names_to_delete(keep(2)) == ["iter_1.pth"]  # 2 and 4 are the newest two that are good


def test_one_that_was_changed_in_place_is_read_again_before_it_is_deleted(store):
    inventory = Inventory(store.root)
    inventory.entries()
    for name in ("manifest.json", "state.json", "tensors.json"):  # as rsync --inplace of a later one would
        shutil.copy(store.root / "iter_4.pth" / name, store.root / "iter_1.pth" / name)
    for folder in ("model", "optimizer", "rng"):
        shutil.copytree(store.root / "iter_4.pth" / folder, store.root / "iter_1.pth" / folder, dirs_exist_ok=True)
    for path in (store.root / "iter_4.pth").glob("*.safetensors"):
        shutil.copy(path, store.root / "iter_1.pth")
    assert inventory.names_to_delete(keep(2)) == ["iter_2.pth"]  # it is a copy of the newest now, which is the user's
