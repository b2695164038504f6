"""The starts of a run under ``verify-resume``; the processes are replaced by a function."""

import json
import sys

import pytest

from mmtrain.errors import ConfigError, RunError
from mmtrain.verify_resume.runs import TrialCommand, run_trial, start_process
from mmtrain.verify_resume.trial import Trial

COMMAND = TrialCommand("a_module", "net.py", 3)
TRIAL = Trial(stop=8, interval=2, kills=(5, 6))


def starts_that(folder, *ends):
    """A `StartProcess`; each end is an exit status, the lines printed, and where the start resumed (None: nowhere)."""
    remaining = iter(ends)

    def start(line, output):
        status, text, resumed_at = next(remaining)
        output.write_text(text)
        if resumed_at is not None:
            record = folder / "record" / "starts.jsonl"
            with record.open("a") as file:
                file.write(json.dumps({"iteration": resumed_at}) + "\n")
        return status

    return start


def test_a_start_after_every_kill(tmp_path):
    start = starts_that(tmp_path, (-9, "", 0), (-9, "", 4), (0, "", 6))
    run = run_trial(COMMAND, TRIAL, tmp_path, start=start)
    assert run.resumed_at == [4, 6]
    assert run.work_dir == tmp_path / "run"


def test_every_start_is_the_same_command(tmp_path):
    lines = []
    inner = starts_that(tmp_path, (-9, "", 0), (-9, "", 4), (0, "", 6))

    def start(line, output):
        lines.append(line)
        return inner(line, output)

    run_trial(TrialCommand("a_module", "net.py", 3, ("a=1",)), TRIAL, tmp_path, start=start)
    assert lines[0] == lines[1] == lines[2]
    assert lines[0][:3] == [sys.executable, "-m", "a_module"]
    assert Trial.from_json(lines[0][3]) == Trial(8, 2, (5, 6), str(tmp_path / "record"))
    assert lines[0][4:] == [
        "net.py", "--work-dir", str(tmp_path / "run"), "--resume", "auto", "--seed", "3", "--cfg-options", "a=1",
    ]  # fmt: skip


def test_a_run_that_ends_before_its_kill(tmp_path):
    start = starts_that(tmp_path, (-9, "", 0), (0, "", 4))
    with pytest.raises(RunError, match="the run ended before the kill at iteration 6; choose an earlier one"):
        run_trial(COMMAND, TRIAL, tmp_path, start=start)


def test_a_start_that_fails(tmp_path):
    start = starts_that(tmp_path, (1, "Traceback\nValueError: this sample is broken\n\nerror: the run failed\n", 0))
    expected = r"start 1 of the run failed with exit status 1. Its last output:\n  Traceback\n"
    with pytest.raises(RunError, match=expected):
        run_trial(COMMAND, TRIAL, tmp_path, start=start)


def test_a_start_with_a_wrong_config(tmp_path):
    start = starts_that(tmp_path, (2, "error: model.hiden: unknown\n", None))
    with pytest.raises(ConfigError, match=r"^model.hiden: unknown$"):
        run_trial(COMMAND, TRIAL, tmp_path, start=start)


def test_a_run_that_starts_from_scratch_after_a_kill(tmp_path):
    start = starts_that(tmp_path, (-9, "", 0), (-9, "", 0), (0, "", 6))
    with pytest.raises(RunError, match="started from scratch after a kill because it found no checkpoint"):
        run_trial(COMMAND, TRIAL, tmp_path, start=start)


def test_the_exit_status_and_the_output_of_a_process(tmp_path):
    code = "import sys; print('one'); print('two', file=sys.stderr); sys.exit(3)"
    assert start_process([sys.executable, "-c", code], tmp_path / "output.txt") == 3
    assert sorted((tmp_path / "output.txt").read_text().split()) == ["one", "two"]
