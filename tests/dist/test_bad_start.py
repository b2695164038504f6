"""What cannot start in several processes: rank 0 reports one sentence, and no rank waits forever."""

import socket
import sys
import threading
import time

import pytest
from commands import SOON, TRAIN, first_line, run, write_config
from ranks import PATHS, free_port, outcomes, start_all

from mmtrain.errors import ConfigError, RunError
from mmtrain.launch import meeting
from mmtrain.launch.alarm import FAILURE_KEY, REPORTED_KEY, RankFailure
from mmtrain.launch.environment import World
from mmtrain.launch.meeting import open_store, announce_as_rank_0, report_to_rank_0, wait_for_all


def world(rank, port, size=2):
    return World("pytorch", rank, size, rank, "127.0.0.1", port)


def in_background(function, *args):
    """Runs a rank's part in a thread; the list holds what it gave."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function(*args)))
    thread.start()
    return thread, found


# ---- meeting ---------------------------------------------------------------------------------------------------------
def test_ranks_that_do_not_come_are_named():
    place = world(0, free_port(), size=4)
    store = open_store(place)
    with pytest.raises(
        RunError, match=r"3 of 4 processes \(rank 1, 2, 3\) did not come to 127\.0\.0\.1:\d+ within 0\.3"
    ):
        wait_for_all(store, place, 0.3)


def test_a_missing_rank_0_is_reported():
    with pytest.raises(RunError, match=r"rank 0 could not be reached at 127\.0\.0\.1:\d+ within 0\.3 seconds"):
        open_store(world(1, free_port()), 0.3)


def test_a_port_in_use_is_reported():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        with pytest.raises(ConfigError, match=r"port \d+ .* is taken by another program; set .* MASTER_PORT"):
            open_store(world(0, other.getsockname()[1]))


def test_a_failure_on_one_rank_ends_the_wait_of_rank_0():
    place = world(0, free_port())
    store = open_store(place)
    thread, reported = in_background(report_to_rank_0, world(1, place.port), RankFailure(1, "the disk is full", 2))
    with pytest.raises(RunError, match="another rank failed"):
        wait_for_all(store, place, SOON)
    assert b"the disk is full" in store.get(FAILURE_KEY)
    store.set(REPORTED_KEY, "")  # what the alarm of rank 0 does
    thread.join()
    assert reported == [True]


def test_a_failure_on_all_ranks_is_reported_once(monkeypatch):
    monkeypatch.setattr(meeting, "HEARING", 2 * SOON)
    port = free_port()
    thread, _ = in_background(announce_as_rank_0, world(0, port), RankFailure(0, "no such key", 2))
    began = time.monotonic()
    assert report_to_rank_0(world(1, port), RankFailure(1, "no such key", 2))
    thread.join()
    assert time.monotonic() - began < SOON


# ---- the real command ------------------------------------------------------------------------------------------------
def check_reported(found, sentence, *, status=2):
    """Only rank 0 reported one sentence, and soon."""
    statuses, errors, seconds = found
    assert statuses == [status, status], errors
    assert sentence in first_line(errors[0]), errors[0]
    assert errors[0].count("error:") == 1
    assert first_line(errors[1]) == ""
    assert seconds < SOON


def alone_on_rank_1(path, code):
    path.write_text(f"import os\nif os.environ['RANK'] == '1':\n    {code}\n" + path.read_text())
    return path


def test_a_config_that_is_broken_only_on_rank_1(tmp_path):
    path = alone_on_rank_1(write_config(tmp_path, "one"), "raise ValueError('half a file')")
    statuses, errors, seconds = found = run(path)
    assert first_line(errors[0]).startswith("error: rank 1: "), found
    assert "half a file" in errors[0]
    assert first_line(errors[1]) == ""
    assert statuses[0] == statuses[1] != 0
    assert seconds < SOON


@pytest.mark.slow
def test_a_config_that_is_broken_everywhere(tmp_path):
    path = write_config(tmp_path, "one", train_cfgs={})
    path.write_text(path.read_text().replace("max_iters", "max_itres"))
    check_reported(run(path), "max_itres")


@pytest.mark.slow
def test_under_torchrun_too(tmp_path):
    """The agent ends rank 0 as soon as rank 1 has left, so rank 1 waits until its failure is reported."""
    path = alone_on_rank_1(write_config(tmp_path, "one"), "raise ValueError('half a file')")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    ((status, errors),) = outcomes(start_all([*command, *TRAIN[1:], str(path)], 1, RANK="", WORLD_SIZE=""), timeout=180)
    assert status != 0
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert lines[0].startswith("error: rank 1: ")
    assert "half a file" in errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "sentence"),
    [
        ({"mesh": {"shard": 3}}, "3 processes, but 2 were started"),
        ({"wrap": ["TinyBlok"]}, "did you mean 'TinyBlock'"),
    ],
)
def test_a_strategy_that_does_not_fit(tmp_path, strategy, sentence):
    check_reported(run(write_config(tmp_path, "one", strategy={"type": "FSDPStrategy", **strategy})), sentence)


@pytest.mark.slow
def test_another_torch_on_rank_1(tmp_path):
    path = write_config(tmp_path, "one")
    path.write_text(path.read_text().replace("['dist_parts'", "['other_torch', 'dist_parts'"))
    module = tmp_path / "other_torch.py"
    module.write_text("import os, torch\nif os.environ['RANK'] == '1':\n    torch.__version__ = '2.0.0'\n")
    check_reported(
        run(path, PYTHONPATH=":".join([str(tmp_path), *PATHS])),
        "torch version differs between ranks: rank 1 has 2.0.0, rank 0 has ",
    )


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["slurm", "mpi"])
def test_a_launcher_that_did_not_start_it(tmp_path, launcher):
    path = write_config(tmp_path, "one")
    check_reported(run(path, "--launcher", launcher), f"--launcher {launcher}: ")
    ((status, errors),) = outcomes(start_all([*TRAIN, str(path), "--launcher", launcher], 1, RANK="", WORLD_SIZE=""))
    assert status == 2
    assert f"--launcher {launcher}: " in first_line(errors)


@pytest.mark.slow
def test_a_checkpoint_of_another_model(tmp_path):
    statuses, errors, _ = run(write_config(tmp_path, "one", train_cfg={"max_iters": 2}))
    assert statuses == [0, 0], errors
    other = write_config(tmp_path, "one", model={"type": "TinyLanguageModel", "width": 9}, resume=True)
    check_reported(run(other), "with a different shape: embed.weight (saved [17, 7], here [17, 9])", status=1)


@pytest.mark.slow
def test_a_port_in_use_by_a_silent_program(tmp_path):
    """Rank 1 reaches it, and gives up when it does not answer as a store does."""
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        path = write_config(tmp_path, "one")
        processes = start_all([*TRAIN, str(path)], 2, MASTER_PORT=port)
        found = outcomes(processes, timeout=180)
    assert [status for status, _ in found] == [2, 1]
    assert "MASTER_PORT" in first_line(found[0][1])
    assert "error: rank 1: rank 0 could not be reached" in found[1][1]
