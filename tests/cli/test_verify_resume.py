"""``mmtrain verify-resume`` with real processes: both results, and wrong options."""

import json
import sys

import pytest
from parts import config

from mmtrain.cli.verify_resume import checkpoint_interval, kill_points, main
from mmtrain.errors import ConfigError

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
    """Writes a config file; the processes find `parts`, and `counting` next to it."""
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
    assert "SIGKILL after iteration 9; resumed at iteration 8" in out
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
    assert "max_epochs=50" in next(kept).read_text()  # its schedules are those of the full run


def test_a_dataset_that_counts_is_found(write, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "tmp").mkdir()
    dataset = {"dataset": {"type": "CountingPoints"}, "batch_size": 8}
    path = write(("parts", "counting"), train_dataloader=dataset)
    status = main([path, "--steps", "8", "--at", "6"])
    out = capsys.readouterr().out
    assert status == 1
    assert "DIFFERENT, first in loss at iteration 5: 0." in out
    assert "That is the first iteration after the resume at iteration 4." in out
    assert "A second undisturbed run was identical to the first, so the resume is not exact." in out
    assert "the dataset, its transforms or the collate function keep state between" in out
    assert list((tmp_path / "tmp").glob("mmtrain-*")) == []


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["DDPStrategy", "FSDPStrategy"])
def test_two_processes(write, tmp_path, capsys, strategy):
    path = write(strategy={"type": strategy}, env_cfg={"dist_cfg": {"backend": "gloo"}})
    options = ["--nproc-per-node", "2", "--steps", "12", "--kills", "2", "--work-dir", str(tmp_path / "trial")]
    status = main([path, *options])
    out = capsys.readouterr().out
    assert status == 0, out
    assert "SIGKILL after iteration 6, 9; resumed at iteration 3, 6" in out
    assert "EXACT" in out
    starts = (tmp_path / "trial/killed/record/starts.jsonl").read_text().splitlines()
    assert len(starts) == 3


def test_the_number_of_processes_is_checked(write, capsys):
    assert main([write(launcher="pytorch")]) == 2
    assert "launcher is 'pytorch'; give the number of processes with --nproc-per-node N" in capsys.readouterr().err
    assert main([write(), "--nproc-per-node", "-1"]) == 2
    assert "--nproc-per-node is -1" in capsys.readouterr().err


def test_a_wrong_config(write, capsys):
    assert main([write(), "--cfg-options", "model.hiden=3"]) == 2
    err = capsys.readouterr().err
    assert "did you mean 'hidden'" in err
    assert len(err.strip().splitlines()) == 1


def test_bad_numbers(write, tmp_path, capsys):
    path = write()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for options, message in {
        ("--at", "20"): "the first kill is at iteration 20, but must be between 2 and 19 in a run of 20 iterations",
        ("--kills", "0"): "--kills is 0",
        ("--steps", "4", "--kills", "3"): "3 kills after iteration 2 do not fit into 4 iterations",
        ("--at", "3", "--cfg-options", "optim_wrapper.accumulative_counts=4"): "comes before the first checkpoint",
        ("--work-dir", str(tmp_path / "full")): "exists and is not empty",
    }.items():
        assert main([path, *options]) == 2, options
        assert message in capsys.readouterr().err


def test_where_it_is_killed_and_saved():
    assert kill_points(20, 1) == (13,)
    assert kill_points(20, 3) == (8, 12, 16)
    assert kill_points(20, 2, at=5) == (5, 12)
    assert checkpoint_interval(20, 13, window=1) == 5
    assert checkpoint_interval(20, 3, window=1) == 2
    assert checkpoint_interval(20, 13, window=3) == 3
    assert checkpoint_interval(128, 85, window=32) == 32
    with pytest.raises(ConfigError, match="an update takes 32 iterations"):
        checkpoint_interval(20, 13, window=32)
