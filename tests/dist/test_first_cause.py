"""What ends one rank while others wait for it: the first cause is reported, and nothing that follows from it."""

import pytest
from commands import SOON, causes, first_line, run, torchrun, with_failure, write_config

SAVES = {"checkpoint": {"type": "CheckpointHook", "interval": 4}, "logger": {"type": "LoggerHook", "interval": 10}}
slow = pytest.mark.slow


def state(rank, kind="ValueError"):
    return {"custom_hooks": [{"type": "BrokenState", "rank": rank, "kind": kind}]}


def metric(rank, where):
    return {
        "val_evaluator": {"type": "BrokenMetric", "rank": rank, "where": where},
        "train_cfg": {"max_iters": 16, "val_interval": 8},
    }


RAISED = "the run failed with ValueError: "
CASES = {
    "hook state of rank 1": (state(1), 1, f"rank 1: {RAISED}no state"),
    "hook state of rank 0": (state(0), 1, f"{RAISED}no state"),
    "extra state of rank 1": ({"model": {"type": "BrokenExtraState", "rank": 1}}, 1, f"rank 1: {RAISED}no extra state"),
    "exit in a save": (state(1, "exit"), 3, "rank 1: sys.exit(3) was called before the end of the run"),
    "Ctrl-C in a save": (state(1, "KeyboardInterrupt"), 130, "rank 1: interrupted by Ctrl-C (KeyboardInterrupt)"),
    "metric of rank 1": (metric(1, "process"), 1, f"rank 1: {RAISED}no boxes"),
    "result that cannot be sent": (
        metric(1, "evaluate"), 1, "rank 1: the run failed with TypeError: cannot pickle '_thread.lock' object"
    ),
    "metric on rank 0": (metric(0, "compute"), 1, f"{RAISED}no boxes"),
}  # fmt: skip
QUICK = ("hook state of rank 1", "hook state of rank 0", "exit in a save")


@pytest.mark.parametrize("case", [*QUICK, *(pytest.param(case, marks=slow) for case in CASES if case not in QUICK)])
def test_an_error_of_one_rank_while_all_work_together(tmp_path, case):
    changes, status, sentence = CASES[case]
    statuses, errors, seconds = run(write_config(tmp_path, "run", **{"default_hooks": SAVES, **changes}))
    assert statuses == [status, status], errors
    assert causes(errors[0]) == [f"error: {sentence}"]
    assert causes(errors[1]) == []
    assert seconds < SOON
    if sentence.startswith("rank 1"):
        assert "rank_1.txt" in errors[0]
        assert "Traceback" in next((tmp_path / "run").glob("*/errors/rank_1.txt")).read_text()


@pytest.mark.parametrize(
    ("kind", "rank", "statuses", "sentence"),
    [
        ("sys.exit 0", 1, [1, 0], "rank 1: sys.exit(0) was called before the end of the run"),
        pytest.param("sys.exit", 0, [1, 1], "sys.exit('the sample is odd') was called before", marks=slow),
        pytest.param("interrupt", 1, [130, 130], "rank 1: interrupted by Ctrl-C", marks=slow),
        pytest.param("os._exit", 1, [1, 3], "rank 1 ended without a report: killed", marks=slow),
        pytest.param("SIGKILL", 1, [1, -9], "rank 1 ended without a report: killed", marks=slow),
    ],
)
def test_a_rank_that_leaves(tmp_path, kind, rank, statuses, sentence):
    found, errors, seconds = run(with_failure(tmp_path, "run", kind, rank))
    assert found == statuses, errors
    assert first_line(errors[0]).startswith(f"error: {sentence}")
    assert causes(errors[1]) == []
    assert seconds < SOON


@pytest.mark.parametrize("kind", ["SIGKILL", pytest.param("os._exit", marks=slow)])
def test_another_rank_reports_that_rank_0_is_gone(tmp_path, kind):
    """torchrun's agent holds the store, so it outlives rank 0; it sends the other rank SIGTERM at once."""
    status, errors = torchrun(with_failure(tmp_path, "run", kind, 0))
    assert status == 1
    (cause,) = causes(errors)
    assert cause.startswith("error: rank 0 ended without a report: killed")

