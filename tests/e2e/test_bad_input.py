"""What a user gets for each mistake: one sentence with the place and the remedy, the right status, no traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from parts import config

ROOT = Path(__file__).resolve().parents[2]

PARTS = "custom_imports = dict(imports=['parts'])\n"
MORE_PARTS = """
import torch
from torch import nn
from mmtrain.registry import MODELS, DATASETS

@MODELS.register_module()
class VectorLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(6, 2)
    def forward(self, x, y):
        return dict(loss=self.line(x))

@MODELS.register_module()
class DetachedLoss(VectorLoss):
    def forward(self, x, y):
        return dict(loss=self.line(x).mean().detach())
"""


def train(folder, text, *options, env=None):
    """Run the real command on a config text; the lines of standard error that are not log lines."""
    path = Path(folder) / "config.py"
    path.write_text(text)
    (Path(folder) / "more_parts.py").write_text(MORE_PARTS)
    command = [sys.executable, str(ROOT / "tools" / "train.py"), str(path), *options]
    search = os.pathsep.join([str(ROOT / "tests"), str(folder)])
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=folder, env={**os.environ, "PYTHONPATH": search, **(env or {})}
    )  # fmt: skip


def text_of(folder, **changes):
    cfg = config(Path(folder) / "work", **changes)
    return PARTS.replace("'parts'", "'parts', 'more_parts'") + "".join(
        f"{key} = {value!r}\n" for key, value in cfg.items()
    )


BAD = {
    # name: (changes of the config, options, status, what the sentence must hold)
    "unknown argument": (
        {"default_hooks": {"checkpoint": {"type": "CheckpointHook", "intervl": 3}}}, [], 2,
        ["default_hooks.checkpoint.intervl", "config.py, line", "did you mean 'interval'"],
    ),
    "unknown key in a section": ({"train_cfg": {"max_iter": 3}}, [], 2, ["train_cfg.max_iter", "'max_iters'"]),
    "misspelt top-level key": ({"loadfrom": "x"}, [], 2, ["loadfrom", "'load_from'"]),
    "misspelt key on the command line": ({}, ["--cfg-options", "optim_wrapper.optimizr.lr=1"], 2, ["optim_wrapper.optimizr"]),
    "wrong type": ({"train_cfg": {"max_iters": "many"}}, [], 2, ["train_cfg.max_iters", "'many'"]),
    "class not found": ({"model": {"type": "Nett"}}, [], 2, ["Nett", "Net", "parts"]),
    "empty dataset": (
        {"train_dataloader": {"dataset": {"type": "NoisyPoints", "size": 0}}}, [], 2, ["train_dataloader.dataset", "empty"],
    ),
    "batch larger than the dataset": (
        {"train_dataloader": {"batch_size": 99, "drop_last": True}}, [], 2, ["train_dataloader.batch_size", "99", "44"],
    ),
    "dataset that raises": (
        {"train_dataloader": {"dataset": {"type": "NoisyPoints", "fails_at": 13}}}, [], 1,
        ["NoisyPoints", "13", "this sample is broken"],
    ),
    "dataset that raises in a worker": (
        {"train_dataloader": {"dataset": {"type": "NoisyPoints", "fails_at": 13}, "num_workers": 2}}, [], 1,
        ["NoisyPoints", "13", "this sample is broken"],
    ),
    "loss that is no scalar": ({"model": {"type": "VectorLoss"}}, [], 1, ["shape (8, 2)", "scalar"]),
    "loss without gradient": ({"model": {"type": "DetachedLoss"}}, [], 1, ["iteration 1", "does not require grad"]),
    "max_iters of 0": ({"train_cfg": {"max_iters": 0}}, [], 2, ["train_cfg.max_iters", "0"]),
    "negative max_iters": ({"train_cfg": {"max_iters": -5}}, [], 2, ["train_cfg.max_iters", "-5"]),
    "metric that validation does not report": (
        {"default_hooks": {"checkpoint": {"type": "CheckpointHook", "save_best": "mAP"}}}, [], 2,
        ["save_best", "'mAP'", "accuracy, loss"],
    ),
    "loss that is not a number": ({"model": {"nan_at": 4}}, [], 1, ["iteration 4", "nan", "nonfinite"]),
    "resume of a file": ({"resume": True, "load_from": "config.py"}, [], 2, ["config.py", "load_from"]),
    "resume of nothing": ({}, ["--resume", "nowhere/iter_5.pth"], 1, ["nowhere/iter_5.pth"]),
    "two ends": ({"train_cfg": {"max_epochs": 3}}, [], 2, ["train_cfg", "max_epochs", "max_iters"]),
}  # fmt: skip


def reported(result):
    """The one sentence; everything else on standard error must be log lines."""
    assert "Traceback" not in result.stderr, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_reported_in_one_sentence(name, tmp_path):
    changes, options, status, fragments = BAD[name]
    result = train(tmp_path, text_of(tmp_path, **changes), *options)
    sentence = reported(result)
    for fragment in fragments:
        assert fragment in sentence
    assert result.returncode == status


def test_a_missing_config(tmp_path):
    result = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "train.py"), "nowhere.py"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 2
    assert "nowhere.py" in reported(result)


def test_a_syntax_error(tmp_path):
    result = train(tmp_path, "a = 1\nmodel = dict(type='Net'\n")
    assert result.returncode == 2
    assert "config.py" in reported(result)
    assert "line 2" in reported(result)


def test_an_unwritable_work_dir(tmp_path):
    (tmp_path / "file").write_text("")
    result = train(tmp_path, text_of(tmp_path), "--work-dir", str(tmp_path / "file" / "work"))
    assert result.returncode == 2
    assert "work_dir" in reported(result)
    assert "--work-dir" in reported(result)


def test_debug_shows_the_traceback(tmp_path):
    result = train(tmp_path, text_of(tmp_path, loadfrom="x"), "--debug")
    assert result.returncode == 2
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")
