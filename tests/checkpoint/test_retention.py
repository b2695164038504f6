import itertools

from mmtrain.checkpoint.retention import Entry, Retention, to_delete


def permanent(*iterations: int) -> list[Entry]:
    return [Entry(f"iter_{i}.pth", i, i // 10) for i in iterations]


def numbers(names: list[str]) -> list[int]:
    return [int(name[5:-4]) for name in names]


def test_the_newest_are_kept():
    assert numbers(to_delete(permanent(1, 2, 3, 4), Retention(max_keep_ckpts=2))) == [1, 2]
    assert to_delete(permanent(1, 2, 3, 4), Retention()) == []
    assert to_delete(permanent(1, 2), Retention(max_keep_ckpts=0)) == []
    assert to_delete([], Retention(max_keep_ckpts=1)) == []


def test_multiples_are_always_kept_and_do_not_count():
    policy = Retention(max_keep_ckpts=1, keep_every=100)
    assert numbers(to_delete(permanent(50, 100, 150, 200, 250, 260), policy)) == [50, 150, 250]
    by_epoch = Retention(max_keep_ckpts=1, keep_every=2, unit="epoch")
    assert numbers(to_delete(permanent(5, 10, 20, 30, 40, 50), by_epoch)) == [5, 10, 30]


def test_a_multiple_of_epochs_is_one_saved_at_the_end_of_an_epoch():
    entries = [Entry("e2", 20, 2), Entry("stopped", 25, 2, in_epoch=True), Entry("e3", 30, 3), Entry("e4", 40, 4)]
    assert to_delete(entries, Retention(max_keep_ckpts=1, keep_every=2, unit="epoch")) == ["stopped"]
    assert to_delete(entries, Retention(max_keep_ckpts=1, keep_every=25)) == ["e2", "e3"]


def test_the_best_is_kept():
    assert numbers(to_delete(permanent(1, 2, 3), Retention(max_keep_ckpts=1), {"iter_1.pth"})) == [2]


def test_temporary_ones_are_deleted_when_a_newer_one_exists():
    entries = [*permanent(10), Entry("t1", 12, 1, temporary=True), Entry("t2", 14, 1, temporary=True)]
    assert to_delete(entries, Retention()) == ["t1"]
    assert to_delete([*entries, *permanent(20)], Retention()) == ["t1", "t2"]
    assert to_delete(entries, Retention(keep_temporary=2)) == []
    assert to_delete(entries, Retention(keep_temporary=0)) == ["t1"]  # the newest is always kept


def test_the_newest_is_never_deleted():
    for kinds in itertools.product([False, True], repeat=4):
        entries = [Entry(f"e{i}", i, i, temporary=kind) for i, kind in enumerate(kinds)]
        for keep, every, temporary in itertools.product([-1, 0, 1, 2], [0, 2], [0, 1]):
            doomed = to_delete(entries, Retention(keep, every, "iteration", temporary))
            assert "e3" not in doomed
            assert not entries or len(doomed) < len(entries)


def test_copies_and_checkpoints_of_other_runs_are_neither_deleted_nor_counted():
    own = [Entry(f"iter_{i}.pth", i, 0, run="a") for i in (10, 20, 30)]
    copies = [Entry("kept", 10, 0, run="a", is_original=False), Entry("z", 40, 0, run="a", is_original=False)]
    others = [Entry("iter_15.pth", 15, 0, run="b"), Entry("iter_50.pth", 50, 0)]
    entries = sorted(own + copies + others, key=lambda entry: entry.iteration)
    policy = Retention(max_keep_ckpts=1, run="a")
    assert to_delete(entries, policy) == ["iter_10.pth", "iter_20.pth"]
    assert to_delete(copies + others, policy) == []
    assert to_delete(entries, Retention(max_keep_ckpts=4)) == ["iter_10.pth"], "of any run"
