"""The power goes after any file operation of many saves: what was reported as saved is found, nothing damaged is taken.

The saves are real, and so is their trace; `power_cuts` says what a disk may hold that had only written what was synced.
"""

import shutil

import pytest
from power_cuts import DATA, ENTRIES, SYNCS, Disk, Recorder, read_tree, write_tree
from saved_state import assert_holds, save

from mmtrain.checkpoint import CheckpointStore, Retention, RetirePolicy
from mmtrain.errors import CheckpointError

RETIRE = RetirePolicy(Retention(max_keep_ckpts=2))


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    """The operations of eight saves into a new directory, with a mark where each begins and where it is reported."""
    disk = tmp_path_factory.mktemp("power") / "disk"
    disk.mkdir()
    files = Recorder(disk)
    store = CheckpointStore(disk / "runs" / "work", fs=files, threads=1)

    def native(directory):  # writes as other code does: without a sync
        files.mkdir(directory / "global_step")
        handle = files.open(directory / "global_step" / "states.pt")
        files.write(handle, memoryview(b"x" * 100))
        files.close(handle)

    for number, (iteration, options) in enumerate([
        (10, {}),
        (20, {"retire": RETIRE}),
        (30, {"retire": RETIRE, "extra_writers": [native]}),
        (40, {"retire": RETIRE, "fields": {"temporary": True}}),
        (50, {"retire": RETIRE, "blocking": False}),
        (51, {"name": "iter_50.pth"}),  # the same name again
        (60, {"retire": RETIRE, "extra_writers": [native], "blocking": False}),
        (70, {"retire": RETIRE}),
    ]):  # fmt: skip
        files.note("begin", other=iteration)
        save(store, iteration, **options).wait()
        files.note("reported", other=iteration)
        assert number < 7 or store.names() == ["iter_60.pth", "iter_70.pth"]
    store.close()
    whole = Disk()
    for operation in files.trace:
        whole.apply(*operation)
    ((_, tree),) = whole.states(["whole"], ["kept"])
    assert tree == read_tree(disk)  # no operation is missing in the trace
    return files.trace


def states(trace, *, every=1, kinds=DATA, entries=ENTRIES, ignored=frozenset()):
    """What may be on the disk after each prefix, each once, with the iterations of which one must be found."""
    disk = Disk(ignored)
    expected = {None}
    seen = set()
    for number, operation in enumerate(trace):
        disk.apply(*operation)
        if operation[0] == "begin":
            expected = expected | {operation[2]}
        elif operation[0] == "reported":
            expected = {operation[2]}
        if number % every == 0 or operation[0] == "reported":
            for what, tree in disk.states(kinds, entries):
                key = (repr(tree), frozenset(expected))
                if key not in seen:
                    seen.add(key)
                    yield f"power cut after operation {number} ({operation[0]}), {what}", tree, expected


def fault(root, tree, expected) -> str | None:
    """What is wrong with the state, as a new process sees it; None if nothing is."""
    write_tree(root, tree)
    store = CheckpointStore(root / "runs" / "work")
    try:
        checkpoint, _ = store.newest_good()
        found = None if checkpoint is None else checkpoint.manifest.iteration
        if found not in expected:
            return f"found {found}, expected one of {expected}"
        for entry in store.entries(verify="full"):
            assert_holds(store.open(entry.name), entry.iteration)
    except (CheckpointError, AssertionError) as error:
        return f"a damaged checkpoint was accepted: {error}"
    finally:
        store.close()
        shutil.rmtree(root)
    return None


def sweep(trace, tmp_path, **options) -> tuple[int, list[str]]:
    """The number of states, and those in which something was lost or damaged."""
    lost = []
    count = 0
    for what, tree, expected in states(trace, **options):
        count += 1
        problem = fault(tmp_path / "disk", tree, expected)
        if problem is not None:
            lost.append(f"{what}: {problem}")
    return count, lost


def test_some_power_cuts_lose_nothing(trace, tmp_path):
    count, lost = sweep(trace, tmp_path, every=9)
    print(f"{count} states")
    assert count > 100
    assert lost == []


@pytest.mark.slow
def test_every_power_cut_loses_nothing(trace, tmp_path):
    count, lost = sweep(trace, tmp_path)
    print(f"{count} states")
    assert count > 500
    assert lost == []


def test_without_any_sync_much_is_lost(trace, tmp_path):
    """So the sweep can fail."""
    count, lost = sweep(trace, tmp_path, every=29, ignored=SYNCS)
    print(f"{len(lost)} of {count} states lost")
    assert len(lost) > 20


@pytest.mark.slow
@pytest.mark.parametrize("ignored", sorted(SYNCS))
def test_each_kind_of_sync_is_needed(trace, tmp_path, ignored):
    count, lost = sweep(trace, tmp_path, every=5, ignored={ignored})
    print(f"{len(lost)} of {count} states lost")
    assert len(lost) > 20


@pytest.mark.slow
def test_a_save_after_a_power_cut_makes_everything_good_again(trace, tmp_path):
    for what, tree, _ in states(trace, every=7):
        write_tree(tmp_path / "disk", tree)
        store = CheckpointStore(tmp_path / "disk" / "runs" / "work")
        store.newest_good()
        save(store, 80, retire=RETIRE)
        assert_holds(store.newest_good()[0], 80)
        hidden = [path.name for path in store.root.iterdir() if path.name.startswith(".")]
        assert hidden == [], what
        assert len(store.entries(verify="full")) <= 3, what
        store.close()
        shutil.rmtree(tmp_path / "disk")
