"""``mmtrain verify-resume``: with real processes for the two verdicts, with what they leave behind for the rest."""

import json
import sys

import pytest
from parts import config

from mmtrain.cli.checkpoint.compare import Difference, Group
from mmtrain.cli.verify_resume import checkpoint_interval, kill_points, main
from mmtrain.errors import ConfigError, RunError
from mmtrain.verify_resume.compare import Outcome, compare_logs, likely_causes, read_logs
from mmtrain.verify_resume.runs import Command, Run, run_through
from mmtrain.verify_resume.trial import Trial

COUNTING = """
from parts import NoisyPoints
from mmtrain.registry import DATASETS

@DATASETS.register_module()
class CountingPoints(NoisyPoints):
    calls = 0

    def __getitem__(self, index):
        self.calls += 1  # starts again at 0 in the process that resumes
        sample = super().__getitem__(index)
        return {**sample, "x": sample["x"] * (1 + 0.01 * self.calls)}
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a config file; the processes find `parts`, and `counting` beside it."""
    tests = next(path for path in sys.path if path.endswith("tests"))
    monkeypatch.setenv("PYTHONPATH", tests)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "counting.py").write_text(COUNTING)

    def write(imports=("parts",), **changes):
        path = tmp_path / "trial.py"
        cfg = {"custom_imports": {"imports": list(imports)}, **config(tmp_path / "never", **changes)}
        path.write_text("".join(f"{key} = {value!r}\n" for key, value in cfg.items()))
        return str(path)

    return write


def test_an_exact_config(write, tmp_path, capsys):
    # epochs, accumulation, no seed, checkpoints by epoch and outside: the trial has to fit itself in
    path = write(
        custom_hooks=[{"type": "Counter"}],
        randomness={"seed": None},
        train_cfg={"by_epoch": True, "max_iters": None, "max_epochs": 50, "val_interval": 1},
        optim_wrapper={"optimizer": {"type": "AdamW", "lr": 0.01}, "accumulative_counts": 2},
        default_hooks={"checkpoint": {"interval": 1, "out_dir": str(tmp_path / "out")}, "logger": None},
    )
    status = main([path, "--steps", "14", "--work-dir", str(tmp_path / "trial")])
    out = capsys.readouterr().out
    assert status == 0, out
    assert "SIGKILL at iteration 9; resumed at iteration 8" in out
    rows = {line[:22].strip(): line[22:].split() for line in out.splitlines() if line[-2:] == " 0"}
    assert rows["loss"] == ["14", "0"]
    assert rows["grad_norm"] == ["7", "0"]
    assert rows["val accuracy"] == ["2", "0"]
    assert rows["state hooks.Counter"] == ["2", "0"]
    assert {"lr", "smooth", "model tensors", "optimizer tensors", "generators"} <= rows.keys()
    assert "EXACT" in out
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "never").exists()
    starts = (tmp_path / "trial/killed/record/starts.jsonl").read_text().splitlines()
    assert [json.loads(start)["iteration"] for start in starts] == [0, 8]
    kept = (tmp_path / "trial/undisturbed/run").glob("*/config.py")
    assert "max_epochs=50" in next(kept).read_text()  # its schedules are those of the whole run


def test_a_data_set_that_counts_is_found_out(write, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "tmp").mkdir()
    dataset = {"dataset": {"type": "CountingPoints"}, "batch_size": 8}
    path = write(("parts", "counting"), train_dataloader=dataset)
    status = main([path, "--steps", "8", "--at", "6"])
    out = capsys.readouterr().out
    assert status == 1
    assert "DIFFERS, first in loss at iteration 5: 0." in out
    assert "That is the first iteration after the resume at 4." in out
    assert "A second undisturbed run was the same to the bit" in out
    assert "the data set, its transforms or the collate function keep something between samples" in out
    assert list((tmp_path / "tmp").glob("mmtrain-*")) == []


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["DDPStrategy", "FSDPStrategy"])
def test_two_processes(write, tmp_path, capsys, strategy):
    path = write(strategy={"type": strategy}, env_cfg={"dist_cfg": {"backend": "gloo"}})
    options = ["--nproc-per-node", "2", "--steps", "12", "--kills", "2", "--work-dir", str(tmp_path / "trial")]
    status = main([path, *options])
    out = capsys.readouterr().out
    assert status == 0, out
    assert "SIGKILL at iteration 6, 9; resumed at iteration 3, 6" in out
    assert "EXACT" in out
    starts = (tmp_path / "trial/killed/record/starts.jsonl").read_text().splitlines()
    assert len(starts) == 3


def test_several_processes_are_asked_for_in_numbers(write, capsys):
    assert main([write(launcher="pytorch")]) == 2
    assert "launcher is 'pytorch'; say how many processes with --nproc-per-node N" in capsys.readouterr().err
    assert main([write(), "--nproc-per-node", "-1"]) == 2
    assert "--nproc-per-node is -1" in capsys.readouterr().err


def test_a_wrong_config(write, capsys):
    assert main([write(), "--cfg-options", "model.hiden=3"]) == 2
    err = capsys.readouterr().err
    assert "did you mean 'hidden'" in err
    assert len(err.strip().splitlines()) == 1


def test_a_start_that_fails(tmp_path, monkeypatch):
    trial = Trial(stop=8, interval=2, kills=(5, 6))
    statuses = iter([-9, 0])
    monkeypatch.setattr("mmtrain.verify_resume.runs._start", lambda *_: next(statuses))
    with pytest.raises(RunError, match="the run ended before the kill at iteration 6; choose an earlier one"):
        run_through(Command("net.py", trial, 3), tmp_path / "a")

    def fail(command, work_dir, output):
        output.write_text("Traceback\nValueError: this sample is broken\n\nerror: the run failed\n")
        return 1

    monkeypatch.setattr("mmtrain.verify_resume.runs._start", fail)
    with pytest.raises(RunError, match=r"start 1 of the run failed with status 1; it last printed:\n  Traceback\n"):
        run_through(Command("net.py", trial, 3), tmp_path / "b")


def test_bad_numbers(write, tmp_path, capsys):
    path = write()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for options, told in {
        ("--at", "20"): "a kill at iteration 20 does not lie between 2 and the last of 20 iterations",
        ("--kills", "0"): "--kills is 0",
        ("--steps", "4", "--kills", "3"): "3 kills from iteration 2 on do not fit into 4 iterations",
        ("--at", "3", "--cfg-options", "optim_wrapper.accumulative_counts=4"): "comes before the first checkpoint",
        ("--work-dir", str(tmp_path / "full")): "exists and is not empty",
    }.items():
        assert main([path, *options]) == 2, options
        assert told in capsys.readouterr().err


def test_where_it_is_killed_and_saved():
    assert kill_points(20, 1) == (13,)
    assert kill_points(20, 3) == (8, 12, 16)
    assert kill_points(20, 2, at=5) == (5, 12)
    assert checkpoint_interval(20, 13, window=1) == 5
    assert checkpoint_interval(20, 3, window=1) == 2
    assert checkpoint_interval(20, 13, window=3) == 3
    assert checkpoint_interval(128, 85, window=32) == 32
    with pytest.raises(ConfigError, match="an update is 32 iterations"):
        checkpoint_interval(20, 13, window=32)


# ---- logs
def log(folder, name, *records):
    path = folder / name / "vis_data" / "scalars.json"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def line(step, mode="train", **values):
    return {"mode": mode, "step": step, "iter": step, **values}


def test_logs_are_compared_in_the_order_of_iterations(tmp_path):
    whole = [
        line(1, lr=0.1, loss=1.0, time=3.0),
        line(2, lr=0.1, loss=0.5),
        line(2, "val", loss=0.25),
        line(3, loss=0.1),
    ]
    log(tmp_path / "a", "1", *whole, line(3, "save", save_time=1.0))
    log(tmp_path / "b", "1", line(1, lr=0.1, loss=1.0, time=4.0))
    log(tmp_path / "b", "2", line(2, lr=0.2, loss=0.5), line(2, "val", loss=0.5), line(3))
    groups, first, iteration = compare_logs(read_logs(tmp_path / "a"), read_logs(tmp_path / "b"), [])
    assert {group.name: (group.compared, len(group.differences)) for group in groups} == {
        "loss": (3, 1), "lr": (2, 1), "val loss": (1, 1),
    }  # fmt: skip
    assert (str(first), iteration) == ("lr at iteration 2: 0.1 != 0.2", 2)
    assert str(groups[0].differences[0]) == "loss at iteration 3: only in the undisturbed run"
    _, first, _ = compare_logs(read_logs(tmp_path / "a"), read_logs(tmp_path / "b"), ["l?"])
    assert str(first) == "val loss at iteration 2: 0.25 != 0.5"


def test_an_iteration_that_is_logged_twice(tmp_path):
    log(tmp_path, "1", line(1), line(2))
    log(tmp_path, "2", line(2))
    with pytest.raises(RunError, match="the train line of iteration 2 is logged twice"):
        read_logs(tmp_path)


# ---- causes
def causes(*names, iteration=None, reproducible=True, **facts):
    groups = [Group(name, 1, [Difference(name, "differs")]) for name in names]
    killed = Run("", 0.0, [{"iteration": 0}, {"iteration": 10}])
    facts = {"device": "cpu", "deterministic": False, **facts}
    return " ".join(likely_causes(Outcome(groups, None, iteration), killed, facts, reproducible=reproducible))


def test_causes():
    assert "no seed reaches" in causes("loss", "model tensors", reproducible=False)
    assert "deterministic=True" not in causes("loss", reproducible=False)
    assert causes("loss", reproducible=False, device="cuda").startswith("GPU kernels")
    assert "deterministic=True" in causes("loss", "model tensors", device="cuda")
    assert "GPU" not in causes("loss", "model tensors", device="cuda", deterministic=True)
    assert causes("state hooks.Speed").startswith("the hook Speed does not put back")
    assert "data set" not in causes("smooth", "state hooks.Counter")
    assert "save_optimizer=False" in causes("loss", "model tensors", iteration=12)
    assert "save_optimizer=False" not in causes("loss", "model tensors", iteration=11)
    assert "randomness.positional" in causes("loss", "model tensors", positional=False)
