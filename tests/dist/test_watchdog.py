"""A run without progress is ended, and reports where it was: real processes that really hang."""

import os
import signal
import subprocess
import threading
import time

import pytest
from commands import SOON, TRAIN, first_line, run, with_failure, write_config
from parts import make_runner
from ranks import environment, outcomes, start_all

from mmtrain.errors import ConfigError
from mmtrain.launch import group
from mmtrain.launch.stacks import RankLocation
from mmtrain.launch.watchdog import Watchdog, find_cause

SHORT = {"custom_hooks": [{"type": "ShortTimeout", "seconds": 4}]}


def stacks(work_dir):
    """What each rank wrote, by its file's name."""
    return {path.name: path.read_text() for path in work_dir.glob("*/errors/hang_rank_*.txt")}


def alive(process):
    """Processes of the group that a rank has started (itself and its data workers)."""
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def alone(path):
    """The command in one process: exit status, stderr, seconds."""
    began = time.monotonic()
    cleared = {key: value for key, value in environment(0, 1, 1).items() if key not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run([*TRAIN, str(path)], env=cleared, capture_output=True, text=True, timeout=180, check=False)
    return done.returncode, done.stderr, time.monotonic() - began


def test_a_hook_that_hangs_on_rank_1(tmp_path):
    statuses, errors, seconds = run(with_failure(tmp_path, "stuck", "hang", 1, **SHORT))
    assert statuses == [1, 1], errors
    cause = first_line(errors[0])
    assert cause.startswith(
        "error: rank 1: no progress for 4 seconds (env_cfg.timeout): stuck after iteration 16 in "
        "after_train_iter (dist_parts.py:"
    )
    assert "the others wait: rank 0 after 16 iterations in " in cause
    assert "hang_rank_*.txt" in cause
    assert first_line(errors[1]) == ""
    assert seconds < SOON
    written = stacks(tmp_path / "stuck")
    assert sorted(written) == ["hang_rank_0.txt", "hang_rank_1.txt"]
    assert "in after_train_iter" in written["hang_rank_1.txt"]
    assert "in _step" in written["hang_rank_0.txt"]


@pytest.mark.slow
def test_a_hook_that_hangs_on_rank_0(tmp_path):
    statuses, errors, _ = run(with_failure(tmp_path, "stuck", "hang", 0, **SHORT))
    assert statuses == [1, 1], errors
    assert first_line(errors[0]).startswith("error: rank 0: no progress for 4 seconds")
    assert "after_train_iter (dist_parts.py:" in first_line(errors[0])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataset_that_hangs_on_rank_1(tmp_path, workers):
    loader = {"dataset": {"type": "HangingTokens", "rank": 1, "index": 30}, "batch_size": 4, "num_workers": workers}
    path = write_config(tmp_path, "stuck", train_dataloader=loader, **SHORT)
    processes = start_all([*TRAIN, str(path)], 2)
    found = outcomes(processes)
    assert [status for status, _ in found] == [1, 1], found
    cause = first_line(found[0][1])
    assert cause.startswith("error: rank 1: no progress for 4 seconds")
    assert "wait_for_the_disk (dist_parts.py:" in cause
    assert ("data worker process" in cause) == bool(workers)
    assert "in wait_for_the_disk" in stacks(tmp_path / "stuck")["hang_rank_1.txt"]
    deadline = time.monotonic() + SOON
    while any(map(alive, processes)):
        assert time.monotonic() < deadline, "processes are left"
        os.sched_yield()


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_named_by_the_other(tmp_path, stopped):
    """It cannot write its stacks. Rank 0 has the store, so without it the others cannot exchange anything."""
    processes = start_all([*TRAIN, str(with_failure(tmp_path, "stuck", "SIGSTOP", stopped, **SHORT))], 2)
    other = processes[1 - stopped]
    try:
        _, errors = other.communicate(timeout=180)
        assert other.returncode == 1
        assert f"rank {stopped}" in first_line(errors)
        assert "did not answer" in first_line(errors)
        assert list(stacks(tmp_path / "stuck")) == [f"hang_rank_{1 - stopped}.txt"]
        # A launcher kills what is left; without one, the rank ends by itself once it continues.
        processes[stopped].send_signal(signal.SIGCONT)
        processes[stopped].communicate(timeout=180)
        assert processes[stopped].returncode == 1
    finally:
        processes[stopped].kill()


@pytest.mark.slow
def test_a_single_process_and_its_data_worker(tmp_path):
    loader = {"dataset": {"type": "HangingTokens", "rank": 0, "index": 30}, "batch_size": 4, "num_workers": 1}
    status, errors, _ = alone(write_config(tmp_path, "stuck", train_dataloader=loader, **SHORT))
    assert status == 1, errors
    assert first_line(errors).startswith("error: no progress for 4 seconds (env_cfg.timeout): stuck after iteration ")
    assert "wait_for_the_disk (dist_parts.py:" in first_line(errors)
    assert "in wait_for_the_disk" in stacks(tmp_path / "stuck")["hang_rank_0.txt"]


WAITING = (RankLocation(0, 16, "look", True), RankLocation(2, 16, "look", True))


@pytest.mark.parametrize(
    ("locations", "missing", "rank", "words"),
    [
        ([*WAITING, RankLocation(1, 16, "read", False)], [], 1, "stuck after iteration 16 in read; the others wait: "),
        # On a GPU the others run ahead until they wait for the device, which is no collective.
        ([RankLocation(0, 20, "read scalars", False), RankLocation(1, 16, "a", True)], [], 1, "wait for one another"),
        (
            [RankLocation(0, 20, "item", False), RankLocation(1, 16, "read", False)],
            [],
            1,
            "stuck after iteration 16 in read; the oth",
        ),
        (WAITING, [1], 1, "rank 1 did not answer"),
        (WAITING[:1], [1, 2], 1, "ranks 1, 2 did not answer"),
        (WAITING, [], 0, "the ranks wait for one another: rank 0 after 16 iterations in look, rank 2 after 16"),
        ([RankLocation(k, 3, "hook", False) for k in range(30)], [], 0, "rank 8 after 3 iterations in hook and 21 more"),
    ],
)
def test_which_rank_is_the_cause(locations, missing, rank, words):
    named, sentence = find_cause({s.rank: s for s in locations}, missing, "nothing moved", "the stacks are there")
    assert named == rank
    assert words in sentence


@pytest.mark.slow
def test_the_limit_of_collectives_is_longer(pair, tmp_path):
    """Also that of the group which the store of checkpoints makes: a long save must not end the run."""
    assert min(min(found) for found in pair.run("dist_parts", "collective_limits", work_dir=str(tmp_path))) > 86400


@pytest.mark.slow
def test_a_rank_that_hangs_while_it_starts(tmp_path):
    path = write_config(tmp_path, "stuck")
    path.write_text(
        path.read_text() + "custom_hooks = [dict(type='HangWhenBuilt', rank=1)]\n"  # between the first collectives
    )
    statuses, errors, _ = run(path)
    assert statuses == [1, 1], errors
    assert "__init__ (dist_parts.py:" in first_line(errors[0])


def test_slow_progress_is_not_a_hang(tmp_path):
    """Validation takes longer than the limit, a batch of it does not."""
    validation = {"dataset": {"type": "SlowTokens", "seconds": 0.3, "size": 20}, "batch_size": 2}
    path = write_config(
        tmp_path, "slow", val_dataloader=validation, train_cfg={"max_iters": 2, "val_interval": 2}, **SHORT
    )  # fmt: skip
    status, errors, seconds = alone(path)
    assert status == 0, errors
    assert seconds > 6


@pytest.mark.parametrize("timeout", [-1, "30 min", True, float("inf")])
def test_an_invalid_limit_is_refused(tmp_path, timeout):
    with pytest.raises(ConfigError, match=r"env_cfg\.timeout"):
        make_runner(tmp_path, env_cfg={"timeout": timeout})


def test_the_limit_is_that_of_the_config(tmp_path, monkeypatch):
    found = []

    def watch(seconds, **options):
        found.append(seconds)
        return Watchdog(seconds, **options)

    monkeypatch.setattr(group, "Watchdog", watch)
    make_runner(tmp_path, env_cfg={"timeout": 77}, train_cfg={"max_iters": 1}).train()
    assert found == [77]


@pytest.mark.parametrize("timeout", [0, None])
def test_no_limit(tmp_path, timeout):
    seen = []

    class Look:
        priority = "NORMAL"

        def after_train(self, runner):
            seen.extend(thread.name for thread in threading.enumerate())

    changes = {"train_cfg": {"max_iters": 1}, "custom_hooks": [Look()]}
    make_runner(tmp_path / "off", env_cfg={"timeout": timeout}, **changes).train()
    assert seen
    assert "mmtrain-watchdog" not in seen
    make_runner(tmp_path / "on", **changes).train()
    assert "mmtrain-watchdog" in seen
    assert "mmtrain-watchdog" not in [thread.name for thread in threading.enumerate()]
