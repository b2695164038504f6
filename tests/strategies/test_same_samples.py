"""With one global batch, any number of processes consumes the same samples in the same updates, also when it changes.

This is checked by the ledger, and by a journal of what the model was given.
"""

import ledger_jobs
import pytest
from parts import logged
from ranks import Group

from mmtrain.cli.checkpoint import main

SIZES = (100, 97)  # the last batch of an epoch has 4 samples, or 1: fewer than there are ranks


@pytest.fixture(scope="module")
def processes():
    """Runs a job in a group of that many processes, or in this one; a group starts when it is first needed."""
    groups = {}

    def run(world, work_dir, **options):
        if world == 1:
            ledger_jobs.train(str(work_dir), **options)
            return
        if world not in groups:
            groups[world] = Group(world)
        groups[world].run("ledger_jobs", "train", work_dir=str(work_dir), **options)

    yield run
    for group in groups.values():
        group.close()


@pytest.fixture(scope="module")
def alone(processes, tmp_path_factory):
    """What one process does without a stop, by the size of the dataset."""
    folders = {size: tmp_path_factory.mktemp("alone") / "run" for size in SIZES}
    for size, folder in folders.items():
        processes(1, folder, size=size)
    return folders


def consumed(folder, capsys, *, size, passes=2):
    """Samples of each update, on which ledger and journal agree, after both say that nothing was lost or repeated."""
    checkpoint = ledger_jobs.newest(folder)
    found = ledger_jobs.by_ledger(checkpoint.state()["ledger"])
    journal, in_pass = ledger_jobs.by_journal(folder, updates=checkpoint.manifest.position["update"])
    assert found == journal
    for number in range(passes):
        assert in_pass[number] == list(range(size)), f"pass {number}"
    assert len(set(in_pass[passes])) == len(in_pass[passes]) > 0
    capsys.readouterr()
    assert main(["audit", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "samples lost: 0, repeated: 0"
    return found


def assert_same_losses(folder, expected):
    ours, theirs = logged(folder, "loss"), logged(expected, "loss")
    assert ours.keys() == theirs.keys()
    for step, (loss,) in theirs.items():
        assert ours[step][0] == pytest.approx(loss, rel=1e-5), f"step {step}"


@pytest.mark.parametrize(
    ("world", "size"),
    [(3, 97), *(pytest.param(w, s, marks=pytest.mark.slow) for w in (2, 3, 4) for s in SIZES if (w, s) != (3, 97))],
)
def test_the_same_samples_in_the_same_updates(processes, alone, tmp_path, capsys, world, size):
    processes(world, tmp_path / "run", size=size)
    assert consumed(tmp_path / "run", capsys, size=size) == consumed(alone[size], capsys, size=size)
    assert_same_losses(tmp_path / "run", alone[size])


@pytest.mark.parametrize(
    "worlds", [(3, 1), pytest.param((2, 3, 1), marks=pytest.mark.slow), pytest.param((1, 4, 2), marks=pytest.mark.slow)]
)
def test_a_change_of_processes_in_the_middle_of_an_epoch(processes, alone, tmp_path, capsys, worlds):
    """Each start but the last is killed, after iterations that its checkpoint does not hold."""
    for start, world in enumerate(worlds):
        crash = 7 + 7 * start if start + 1 < len(worlds) else None
        processes(world, tmp_path / "run", start=start, crash=crash)
    assert consumed(tmp_path / "run", capsys, size=100) == consumed(alone[100], capsys, size=100)
    assert_same_losses(tmp_path / "run", alone[100])


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_a_change_of_processes_and_batch_size(processes, tmp_path, capsys, size):
    """The batch changes with the number of processes, so the updates differ; every sample is still there once."""
    for start, (world, batch, crash, end) in enumerate([(2, 12, 7, 24), (3, 24, 8, 24), (1, 8, None, 36)]):
        processes(world, tmp_path / "run", start=start, batch=batch, crash=crash, iterations=end, size=size)
    consumed(tmp_path / "run", capsys, size=size)
    segments = ledger_jobs.newest(tmp_path / "run").state()["ledger"]["segments"]
    assert [(one["world_size"], one["batch_size"]) for one in segments] == [(2, 6), (3, 8), (1, 8)]
    assert all(0 < one["position"][1] < size for one in segments[1:]), "the moves are in the middle of a pass"
