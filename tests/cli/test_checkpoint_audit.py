"""``tools/checkpoint.py audit`` on real runs: restarts, changed batches, data moved on purpose, faults, no ledger."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import exactness
import pytest
from exactness import assert_same, left_behind
from parts import make_runner

from mmtrain.checkpoint import CheckpointStore
from mmtrain.cli.checkpoint import main
from mmtrain.data.sampler import PositionSampler
from mmtrain.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
MODEL = {"type": "Net", "dropout": 0.0}
HOOKS = {"checkpoint": {"type": "CheckpointHook", "interval": 3}}


def train(work, *, iterations=14, crash=None, ledger=True, **changes):
    """Continue to ``iterations``, or up to a crash that loses what was done since the last save."""
    cfg = {
        "val_dataloader": None,
        "default_hooks": HOOKS,
        "model": MODEL,
        **changes,
    }
    cfg["train_cfg"] = {"ledger": ledger, "max_iters": iterations}
    exactness.train(work, crash=None if crash is None else ("iteration", crash), **cfg)


def rewrite(work, change):
    """The newest checkpoint again, with its ledger changed: its hashes are right, only the record is not."""
    store = CheckpointStore(work)
    old = store.newest_good()[0]
    sections = {s: {n: old.read(s, n) for n in old.tensor_names(s)} for s in old.sections()}
    state, fields = old.state(), ("position", "strategy", "seed", "meta", "config")
    change(state["ledger"])
    kept = {key: getattr(old.manifest, key) for key in fields}
    store.save(old.name, sections, state=state, rng=old.rng(), manifest_fields=kept, blocking=True)
    store.close()


@pytest.fixture
def audit(capsys):
    def run(*arguments):
        capsys.readouterr()
        status = main(["audit", *map(str, arguments)])
        found = capsys.readouterr()
        return status, found.out, found.err

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    work = tmp_path_factory.mktemp("audit") / "work"
    train(work, crash=5)
    train(work, crash=8)
    train(work, crash=10, iterations=40, train_dataloader={"batch_size": 6, "num_workers": 1})
    train(work, iterations=20, optim_wrapper={"accumulative_counts": 2}, train_dataloader={"batch_size": 4})
    return work


def test_over_restarts_and_changed_batches(trained, audit):
    status, out, err = audit(trained)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[-1] == "samples lost: 0, repeated: 0"
    assert [line.split()[5:8] for line in lines[3:6]] == [["8", "x", "1"], ["6", "x", "1"], ["4", "x", "1"]]
    passes = [line.split() for line in lines if line.startswith("    1") or line.startswith("    2")]
    assert passes[0][-4:] == ["44", "44", "0", "0"]


def test_the_real_command_and_an_older_checkpoint(trained):
    command = [sys.executable, str(ROOT / "tools" / "checkpoint.py"), "audit", str(trained), "iter_6.pth"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")
    assert "iter_6.pth: 6 updates, 44 samples" in found.stdout
    assert found.stdout.endswith("samples lost: 0, repeated: 0\n")


def test_a_resumed_run_has_the_ledger_of_an_uninterrupted_one(tmp_path):
    train(tmp_path / "uninterrupted")
    train(tmp_path / "broken", crash=5)
    train(tmp_path / "broken")
    ledgers = [left_behind(tmp_path / name)["state"]["ledger"] for name in ("uninterrupted", "broken")]
    assert_same(*ledgers)


def test_the_samples_of_a_changed_record_are_named(tmp_path, audit):
    train(tmp_path)
    rewrite(tmp_path, lambda ledger: ledger["runs"].pop(1))
    status, out, _ = audit(tmp_path)
    assert status == 1
    assert "after update 5" in out
    assert out.count("was lost: position") == 4
    assert out.endswith("samples lost: 4, repeated: 0\n")


def test_a_sampler_that_repeats_and_skips_is_found(tmp_path, audit, monkeypatch):
    sound = PositionSampler.batch_indices

    def faulty(self, epoch, offset):
        for draw in sound(self, epoch, offset):
            yield draw._replace(indices=[draw.indices[1], *draw.indices[1:]]) if draw.offset == 16 else draw

    monkeypatch.setattr(PositionSampler, "batch_indices", faulty)
    train(tmp_path, iterations=4)
    status, out, _ = audit(tmp_path)
    assert status == 1
    assert "was lost: position 16, which update 3 was to read" in out
    assert "was repeated: read in update 3, 2 times" in out
    assert out.endswith("samples lost: 1, repeated: 1\n")


@pytest.mark.parametrize("choice", ["restart", {"skip_iters": 1}])
def test_data_moved_on_purpose(tmp_path, audit, choice):
    train(tmp_path, iterations=8)
    train(tmp_path, iterations=12, resume_data=choice)
    status, out, _ = audit(tmp_path)
    assert status == 0, out
    assert f"epoch 2: left at sample 16 by resume_data={choice!r}" in out
    assert "samples lost: 0, repeated: 0" in out


def test_without_a_ledger(tmp_path, audit):
    train(tmp_path, iterations=4, ledger=False)
    status, out, err = audit(tmp_path)
    assert (status, out) == (1, "")
    assert "iter_4.pth has no ledger" in err
    assert "train_cfg=dict(ledger=True" in err
    train(tmp_path, iterations=8)
    status, out, _ = audit(tmp_path)
    assert status == 0
    assert "the record begins at sample 32" in out


def test_data_without_sample_indices_are_refused_at_the_start(tmp_path):
    import torch

    loader = torch.utils.data.DataLoader([{"x": 1.0}], batch_size=1)
    with pytest.raises(ConfigError, match="train_cfg.ledger"):
        make_runner(tmp_path, train_dataloader=loader, train_cfg={"ledger": True})


def more_iterations(ledger):
    ledger["runs"][1][3] = 10**18  # of the first span after the header


def no_list(ledger):
    ledger["segments"] = 3


def a_later_epoch(ledger):
    ledger["runs"][-1][1] = 10**12


@pytest.mark.parametrize("change", [more_iterations, no_list, a_later_epoch])
def test_a_ledger_that_no_run_can_have_is_refused_at_once(trained, tmp_path, audit, change):
    work = shutil.copytree(trained, tmp_path / "work")
    rewrite(work, change)
    status, out, err = audit(work)
    assert (status, out) == (1, "")
    assert re.search(r"error: .*ledger", err), err
    assert "Traceback" not in err
