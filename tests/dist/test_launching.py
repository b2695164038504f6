"""The real command in real processes: which rank reports, which ranks stop, and how soon."""

import re
import signal
from importlib.util import find_spec

import pytest
from commands import SOON, causes, first_line, run, torchrun, with_failure, write_config
from exactness import assert_same, left_behind


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """What an uninterrupted run of two processes leaves; it is started as torchrun does, without any flag."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    statuses, errors, _ = run(write_config(folder, "uninterrupted"))
    assert statuses == [0, 0], errors
    assert errors[1] == ""
    left = left_behind(folder / "uninterrupted")
    assert left["name"] == "iter_40.pth"
    return left


@pytest.mark.slow
def test_a_wrong_launcher_is_reported_only_by_rank_0(tmp_path):
    statuses, errors, _ = run(write_config(tmp_path, "one"), "--launcher", "slurm")
    assert statuses == [2, 2]
    assert errors[1] == ""
    assert errors[0].count("error:") == 1
    assert "--launcher slurm" in errors[0]


def test_an_error_on_all_ranks_is_reported_only_by_rank_0(tmp_path):
    path = write_config(tmp_path, "one", strategy={"type": "SingleDeviceStrategy"})
    statuses, errors, _ = run(path)
    assert statuses == [2, 2], errors
    assert errors[1] == ""
    assert errors[0].count("error:") == 1
    assert "SingleDeviceStrategy runs in one process and 2 were started" in errors[0]


@pytest.mark.parametrize(
    ("kind", "rank", "cause"),
    [
        ("raise", 1, "error: rank 1: the run failed with ValueError: the sample is broken"),
        pytest.param("raise", 0, "error: the run failed with ValueError: the sample is broken", marks=pytest.mark.slow),
        pytest.param("refuse", 1, "error: rank 1: the sample is refused", marks=pytest.mark.slow),
    ],
)
def test_an_error_on_one_rank(tmp_path, kind, rank, cause):
    statuses, errors, seconds = run(with_failure(tmp_path, "bad", kind, rank))
    assert statuses == [1, 1]
    assert first_line(errors[0]) == cause
    assert first_line(errors[1]) == ""
    assert seconds < SOON
    trace = next((tmp_path / "bad").glob(f"*/errors/rank_{rank}.txt")).read_text()
    assert "in after_train_iter" in trace


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(uninterrupted, tmp_path, rank):
    path = with_failure(tmp_path, "broken", "SIGTERM", rank, once=True)
    statuses, errors, _ = run(path)
    assert statuses == [75, 75], errors
    assert (tmp_path / "broken" / "iter_16.pth" / "manifest.json").exists()
    assert "SIGTERM received" in errors[0]
    statuses, errors, _ = run(path)
    assert statuses == [0, 0], errors
    assert_same(uninterrupted, left_behind(tmp_path / "broken"))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_others(uninterrupted, tmp_path, rank):
    path = with_failure(tmp_path, "broken", "SIGKILL", rank, iteration=26, once=True)
    statuses, errors, seconds = run(path)
    assert statuses[rank] == -9
    assert statuses[1 - rank] == 1
    said = {0: "rank 1: lost the connection to rank 0: it was killed", 1: "rank 1 ended without a report: killed"}
    assert re.search(rf"^error: {said[rank]}", errors[1 - rank], re.M)
    assert "Traceback" not in errors[1 - rank]
    assert seconds < SOON
    statuses, errors, _ = run(path)
    assert statuses == [0, 0], errors
    assert_same(uninterrupted, left_behind(tmp_path / "broken"))


TENSOR_PARALLEL = {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}
deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is optional and not installed")


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    [
        {"type": "DDPStrategy"},
        {"type": "FSDPStrategy"},
        {"type": "FSDPStrategy", "mesh": {"tp": 2}, "tensor_parallel": TENSOR_PARALLEL},
        pytest.param({"type": "DeepSpeedStrategy", "zero_optimization": {"stage": 2}}, marks=deepspeed),
        pytest.param({"type": "DeepSpeedStrategy", "zero_optimization": {"stage": 3}}, marks=deepspeed),
    ],
    ids=["ddp", "fsdp", "tp", "zero2", "zero3"],
)
def test_torchrun_restarts_a_killed_rank_and_the_result_is_the_same(tmp_path, strategy):
    changes = {"strategy": strategy, "model": {"type": "TinyLanguageModel", "width": 8}}
    statuses, errors, _ = run(write_config(tmp_path, "uninterrupted", **changes))
    assert statuses == [0, 0], errors
    path = with_failure(tmp_path, "broken", "SIGKILL", 1, iteration=26, once=True, **changes)
    status, errors = torchrun(path, "--max-restarts=1")
    assert status == 0, errors
    assert "Auto resumed from the latest checkpoint" in errors
    assert_same(left_behind(tmp_path / "uninterrupted"), left_behind(tmp_path / "broken"))


def test_when_torchrun_itself_is_killed_no_rank_is_blamed(tmp_path):
    path = with_failure(tmp_path, "broken", "kill the agent", 1)
    status, errors = torchrun(path)
    assert status == -signal.SIGKILL
    reported = causes(errors)
    assert reported, errors
    assert all("lost the connection to torchrun's agent, which" in line for line in reported), errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_one_clock_saves_on_all_ranks(tmp_path):
    hooks = {"checkpoint": {"type": "CheckpointHook", "interval": 1000, "every_seconds": 0.01}}
    path = write_config(tmp_path, "clock", default_hooks={**hooks, "logger": {"type": "LoggerHook", "interval": 10}})
    statuses, errors, _ = run(path)
    assert statuses == [0, 0], errors
    assert "Saved checkpoint" in errors[0]
    assert left_behind(tmp_path / "clock")["name"] == "iter_40.pth"
