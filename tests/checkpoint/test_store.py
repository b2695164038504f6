import contextlib
import shutil
import threading

import pytest
import torch
from saved_state import assert_holds, hidden, save, tensors_of

from mmtrain.checkpoint import CheckpointStore, LocalFiles, Retention, RetirePolicy, open_checkpoint
from mmtrain.checkpoint.write import storage
from mmtrain.errors import CheckpointError


class Gate(LocalFiles):
    """Holds back the manifest until the test opens the gate; ``error`` is then raised instead."""

    def __init__(self, error: OSError | None = None) -> None:
        self.gate = threading.Event()
        self.error = error

    def open(self, path):
        if path.name == "manifest.json":
            assert self.gate.wait(120)
            if self.error is not None:
                error, self.error = self.error, None
                raise error
        return super().open(path)


@pytest.fixture
def make(tmp_path):
    stores = []

    def make_store(**options):
        stores.append(CheckpointStore(tmp_path / "work", **options))
        return stores[-1]

    yield make_store
    for store in stores:
        with contextlib.suppress(CheckpointError):
            store.close()


@pytest.mark.parametrize("blocking", [True, False])
def test_what_was_saved_is_loaded(make, blocking):
    store = make()
    pending = save(store, 30, blocking=blocking)
    pending.wait()
    assert_holds(store.open("iter_30.pth"), 30)
    assert pending.done
    assert pending.bytes == store.open("iter_30.pth").manifest.bytes == store.entries()[0].bytes
    assert pending.stall_seconds > 0
    assert pending.notices == []
    assert store.pointer() == "iter_30.pth"
    assert hidden(store.root) == []


def test_an_asynchronous_save_contains_the_state_at_its_request(make):
    files = Gate()
    store = make(fs=files)
    tensors = tensors_of(3)
    pending = store.save("iter_3.pth", tensors, manifest_fields={"position": {"iteration": 3}})
    for tensor in tensors["model"].values():
        tensor.zero_()
    pending.wait_staged()
    for tensor in tensors["optimizer"].values():
        tensor.zero_()
    assert not pending.done
    assert store.names() == []
    files.gate.set()
    store.wait()
    for section, expected in tensors_of(3).items():
        for name, tensor in expected.items():
            assert torch.equal(store.open("iter_3.pth").read(section, name), tensor)


def test_one_save_at_a_time(make):
    files = Gate()
    store = make(fs=files)
    first = save(store, 1, blocking=False)
    threading.Timer(0.05, files.gate.set).start()
    second = save(store, 2, blocking=False)
    assert first.done
    second.wait()
    assert store.names() == ["iter_1.pth", "iter_2.pth"]


def test_a_background_error_is_reported_once(make):
    files = Gate(OSError(28, "No space left on device"))
    store = make(fs=files)
    pending = save(store, 1, blocking=False)
    files.gate.set()
    pending.join()
    assert "No space left" in str(pending.error)
    with pytest.raises(
        CheckpointError, match=r"iter_1\.pth was not saved: .*No space left.*older checkpoints are untouched"
    ):
        store.wait()
    store.wait()
    save(store, 2, blocking=False).wait()
    assert store.names() == ["iter_2.pth"]
    assert hidden(store.root) == []


@pytest.mark.parametrize("call", ["save", "wait", "close"])
def test_a_background_error_is_reported_by_the_next_call(make, call):
    files = Gate(OSError(5, "Input/output error"))
    files.gate.set()
    store = make(fs=files)
    save(store, 1, blocking=False)
    with pytest.raises(CheckpointError, match="Input/output error"):
        save(store, 2) if call == "save" else getattr(store, call)()
    if call != "close":
        save(store, 3)
        assert store.names() == ["iter_3.pth"]


def test_saving_under_the_same_name_replaces(make):
    store = make()
    save(store, 5)
    save(store, 6, name="iter_5.pth")
    assert_holds(store.open("iter_5.pth"), 6)
    assert store.names() == ["iter_5.pth"]
    assert hidden(store.root) == []


def test_a_directory_of_another_program_is_kept_under_another_name(make):
    store = make()
    store.root.mkdir()
    (store.root / "iter_5.pth").write_text("an MMEngine checkpoint")
    pending = save(store, 5)
    assert_holds(store.open("iter_5.pth"), 5)
    (kept,) = [p for p in store.root.iterdir() if ".foreign-" in p.name]
    assert kept.read_text() == "an MMEngine checkpoint"
    assert "was not written by mmtrain" in pending.notices[0]


def test_a_damaged_checkpoint_of_the_same_name_is_replaced(make):
    store = make()
    save(store, 5)
    (store.root / "iter_5.pth" / "manifest.json").unlink()
    save(store, 5)
    assert_holds(store.open("iter_5.pth"), 5)
    assert hidden(store.root) == []


def test_retention_acts_after_each_save(make):
    store = make()
    retire = RetirePolicy(Retention(max_keep_ckpts=2), frozenset({"iter_2.pth"}))
    for i in range(1, 6):
        save(store, i, retire=retire)
    assert store.names() == ["iter_2.pth", "iter_4.pth", "iter_5.pth"]
    assert store.prune(RetirePolicy(Retention(max_keep_ckpts=1), frozenset({"iter_2.pth"}))) == ["iter_4.pth"]
    save(store, 6)
    assert store.names() == ["iter_2.pth", "iter_5.pth", "iter_6.pth"], "a save without a policy deletes nothing"
    assert hidden(store.root) == []


def test_what_a_user_copied_renamed_or_linked_stays(make, tmp_path):
    store = make()
    retire = RetirePolicy(Retention(max_keep_ckpts=1))
    save(store, 1), save(store, 2), save(store, 3)
    shutil.copytree(store.root / "iter_1.pth", store.root / "before_lr_change")
    shutil.copytree(store.root / "iter_1.pth", store.root / "iter_9.pth")
    (store.root / "iter_2.pth").rename(store.root / "renamed")
    (store.root / "iter_3.pth").rename(tmp_path / "iter_3.pth")
    (store.root / "iter_3.pth").symlink_to(tmp_path / "iter_3.pth")
    for iteration in (4, 5):
        save(store, iteration, retire=retire)
    assert store.prune(retire) == []
    kept = ["before_lr_change", "iter_3.pth", "iter_5.pth", "iter_9.pth", "renamed"]
    assert sorted(store.names()) == kept
    pending = save(store, 9)
    assert "is a copy of iter_1.pth; it is kept as iter_9.pth.foreign-" in pending.notices[0]
    assert_holds(store.open("iter_9.pth"), 9)
    assert_holds(store.open(next(store.root.glob("iter_9.pth.foreign-*"))), 1)


def test_temporary_checkpoints_are_deleted_when_a_newer_one_exists(make):
    store = make()
    save(store, 1, retire=RetirePolicy())
    save(store, 2, retire=RetirePolicy(), fields={"temporary": True})
    save(store, 3, retire=RetirePolicy(), fields={"temporary": True})
    assert store.names() == ["iter_1.pth", "iter_3.pth"]
    assert [entry.temporary for entry in store.entries()] == [False, True]
    save(store, 4, retire=RetirePolicy())
    assert store.names() == ["iter_1.pth", "iter_4.pth"]


def test_extra_writers_write_into_the_transaction(make):
    store = make()

    def native(directory):
        (directory / "global_step3").mkdir()
        (directory / "global_step3" / "mp_rank_00_model_states.pt").write_bytes(b"x" * 1000)
        (directory / "latest").write_text("global_step3")

    save(store, 3, extra_writers=[native])
    checkpoint = store.open("iter_3.pth")
    assert checkpoint.manifest.files["global_step3/mp_rank_00_model_states.pt"].size == 1000
    (checkpoint.path / "latest").write_text("global_step4")
    with pytest.raises(CheckpointError, match="latest: its contents are not what was written"):
        store.open("iter_3.pth")


def test_an_extra_writer_that_fails_leaves_nothing(make):
    store = make()

    def native(directory):
        (directory / "half").write_text("x")
        raise RuntimeError("engine says no")

    for blocking in (True, False):
        with pytest.raises(CheckpointError, match="engine says no"):
            save(store, 3, extra_writers=[native], blocking=blocking).wait()
    assert list(store.root.iterdir()) == []


def test_a_state_that_is_not_plain_is_named_and_nothing_is_left(make):
    store = make()
    for blocking in (True, False):
        with pytest.raises(CheckpointError, match=r"state\.hooks\.mine: a .*Thread cannot be saved"):
            store.save("a", {}, state={"hooks": {"mine": threading.Thread()}}, blocking=blocking).wait()
    assert list(store.root.iterdir()) == []


def test_names_are_checked(make):
    store = make()
    for name in ("", ".x", "a/b", "last_checkpoint"):
        with pytest.raises(CheckpointError, match="cannot be the name of a checkpoint"):
            store.save(name, {})
    for section in ("state", "rng", "a/b", ""):
        with pytest.raises(CheckpointError, match="cannot be the name of a section"):
            store.save("a", {section: {}})
    with pytest.raises(TypeError):
        store.save("a", {}, manifest_fields={"positon": {}})


def test_newest_good_skips_damaged_ones_and_reports_why(make):
    store = make()
    for i in (1, 2, 3, 4):
        save(store, i)
    assert store.newest_good()[1] == []
    weights = next((store.root / "iter_4.pth" / "model").iterdir())
    weights.write_bytes(weights.read_bytes()[:-1])
    (store.root / "iter_3.pth" / "manifest.json").unlink()
    (store.root / "last_checkpoint").write_text("iter_99.pth")
    checkpoint, problems = store.newest_good()
    assert_holds(checkpoint, 2)
    assert sorted(map(str, problems)) == [
        "iter_3.pth/manifest.json: missing; this is not a complete checkpoint",
        f"iter_4.pth/model/{weights.name}: {weights.stat().st_size} bytes instead of {weights.stat().st_size + 1}",
    ]
    assert store.names() == ["iter_1.pth", "iter_2.pth"]


def test_flipped_bits_are_found_only_by_full_verification(make):
    store = make()
    save(store, 1), save(store, 2)
    path = store.root / "iter_2.pth" / "state.json"
    path.write_bytes(path.read_bytes().replace(b"0.1", b"0.2"))
    assert store.newest_good("size")[0].name == "iter_2.pth"
    assert store.newest_good("full")[0].name == "iter_1.pth"


def test_an_empty_store_has_no_newest(make):
    assert make().newest_good() == (None, [])


def test_a_moved_directory_still_opens(make, tmp_path):
    store = make()
    save(store, 1)
    store.root.rename(tmp_path / "moved")
    moved = CheckpointStore(tmp_path / "moved")
    assert moved.pointer() == "iter_1.pth"
    assert_holds(moved.newest_good()[0], 1)
    assert_holds(open_checkpoint(tmp_path / "moved" / "iter_1.pth"), 1)
    moved.close()


def test_paths_that_cannot_be_opened_are_named(make, tmp_path):
    store = make()
    with pytest.raises(CheckpointError, match=r"iter_1\.pth: no such checkpoint"):
        store.open("iter_1.pth")
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"x")
    with pytest.raises(CheckpointError, match="resume=False"):
        store.open(weights)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"manifest\.json: missing"):
        store.open(tmp_path / "empty")


def test_the_live_tensors_are_released(make):
    import weakref

    store = make()
    big = torch.ones(10)
    gone = threading.Event()
    weakref.finalize(big, gone.set)
    store.save("a", {"model": {"x": big}}, blocking=False).wait()
    del big
    assert gone.wait(120)  # a thread of a pool releases its job after it reports that it is done


def test_nothing_is_written_to_the_disk_below_a_lost_mount(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path / "work")
    save(store, 10).wait()
    real = storage.device_of
    monkeypatch.setattr(storage, "device_of", lambda path: real(path) + 1)
    with pytest.raises(CheckpointError, match="is on another disk than at the start"):
        save(store, 20)
    monkeypatch.undo()
    save(store, 30).wait()
    assert store.names() == ["iter_10.pth", "iter_30.pth"]
    store.close()
