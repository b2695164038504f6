"""Every verb of ``tools/checkpoint.py``, on the checkpoints of one short run."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parts import make_runner

from mmtrain.checkpoint import CheckpointStore, WorkDirLock
from mmtrain.cli.checkpoint.text import counted, size

ROOT = Path(__file__).resolve().parents[2]


def damage(checkpoint, pattern="model/*.safetensors"):
    """Flip one byte in the middle; the size stays."""
    path = next(checkpoint.glob(pattern))
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    return path.relative_to(checkpoint)


def remake(work, name, *, tensors=None, state=None, rng=None):
    """Write a checkpoint again with changes made by functions on its contents."""
    store = CheckpointStore(work)
    old = store.open(name)
    sections = {s: {n: old.read(s, n) for n in old.tensor_names(s)} for s in old.sections()}
    contents = {"tensors": sections, "state": old.state(), "rng": old.rng()}
    for key, change in {"tensors": tensors, "state": state, "rng": rng}.items():
        if change is not None:
            change(contents[key])
    fields = {key: getattr(old.manifest, key) for key in ("position", "strategy", "seed", "meta", "config")}
    store.save(name, sections, state=contents["state"], rng=contents["rng"], manifest_fields=fields, blocking=True)
    store.close()


# ---- list
def test_list(trained, run):
    status, out, err = run("list", trained)
    lines = out.splitlines()
    assert (status, err) == (0, "")
    assert lines[0].split() == ["NAME", "ITER", "EPOCH", "SIZE", "CREATED", "WORLD", "STRATEGY", "GOOD", "MARKS"]
    assert [line.split()[0] for line in lines[1:]] == ["iter_7.pth", "iter_10.pth", "iter_14.pth", "iter_20.pth"]
    assert re.search(
        r"^iter_20.pth +20 +3 +[\d.]+ KB +\d{4}-\d\d-\d\d \d\d:\d\d +1 +SingleDevice +yes +newest", out, re.M
    )
    best = json.loads((trained / "best.json").read_text())["accuracy"]["checkpoint"]
    assert "best accuracy" in next(line for line in lines if line.startswith(best))
    assert lines[-1].endswith("pointer")
    assert max(map(len, lines)) <= 110


def test_list_names_the_fault_of_damaged_ones(work, run):
    (work / "iter_7.pth" / "manifest.json").unlink()
    (work / "iter_14.pth" / "state.json").write_text("{}")
    damaged = damage(work / "iter_20.pth")
    (work / "last_checkpoint").write_text("iter_99.pth")
    status, out, _ = run("list", work)
    assert status == 0
    assert re.search(r"^iter_7.pth +\? .* NO$", out, re.M)
    assert re.search(r"^iter_14.pth +14 .* NO$", out, re.M)
    assert re.search(r"^iter_20.pth .* yes +newest", out, re.M)  # its size is right
    assert "damaged: iter_7.pth/manifest.json: missing" in out
    assert re.search(r"damaged: iter_14.pth/state.json: 2 bytes instead of \d+", out)
    assert "last_checkpoint names iter_99.pth, which does not exist" in out
    _, out, _ = run("list", work, "--full")
    assert re.search(r"^iter_10.pth .* yes +newest", out, re.M)
    assert f"damaged: iter_20.pth/{damaged}: its contents are not what was written" in out


def test_list_of_an_empty_directory(tmp_path, run):
    assert run("list", tmp_path) == (0, f"there is no checkpoint in {tmp_path}\n", "")


# ---- show
def test_show(trained, run):
    status, out, _ = run("show", trained)
    assert status == 0
    assert out.splitlines()[0] == str(trained / "iter_20.pth")
    for text in (
        "iteration 20, update 20", "3 epochs completed, 16 of 44 samples", "seed       5", "SingleDeviceStrategy",
        "8 per process, 1 iteration per update", "AdamW", f"torch {torch.__version__}", "NoisyPoints:44",
        "ema (6 tensors, 360 B)", "Counter (1 tensor, 4 B)", "progress, log, scaler, schedules",
        "generators, data (1 rank)",
        "model/first.weight                 float32 [8, 6]  192 B", "largest tensors (of 27;",
    ):  # fmt: skip
        assert text in out
    assert re.search(r"model +9 +432 B +float32 x 8, int64 x 1", out)
    assert max(map(len, out.splitlines())) <= 100


def test_show_tensors_and_config(trained, run):
    _, out, _ = run("show", trained / "iter_7.pth", "--tensors")
    assert "model/norm.num_batches_tracked" in out
    assert sum(line.startswith("  optimizer/") for line in out.splitlines()) == 18
    _, out, _ = run("show", trained / "iter_7.pth", "--config")
    assert out == CheckpointStore(trained).open("iter_7.pth").manifest.config


# ---- verify
def test_verify(work, run):
    status, out, _ = run("verify", work)
    assert status == 0
    assert [line.split()[:2] for line in out.splitlines()] == [
        ["good", f"iter_{number}.pth"] for number in (7, 10, 14, 20)
    ]
    first, second = damage(work / "iter_20.pth"), damage(work / "iter_20.pth", "optimizer/*")
    status, out, _ = run("verify", work)
    assert status == 1
    assert [line.split(":")[0] for line in out.splitlines() if line.startswith("DAMAGED")] == [
        f"DAMAGED  iter_20.pth/{path}" for path in sorted((first, second))
    ]
    assert out.splitlines()[-1] == "1 of 4 checkpoints damaged; the newest good one is iter_14.pth"
    status, out, _ = run("verify", work / "iter_20.pth")
    assert (status, len(out.splitlines())) == (1, 2)
    assert run("verify", work / "iter_7.pth")[0] == 0


# ---- diff
def test_a_checkpoint_equals_itself(work, run, monkeypatch):
    monkeypatch.chdir(work)
    status, out, _ = run("diff", "iter_20.pth", work)  # a name here, and the newest of a work dir
    assert status == 0
    assert "identical, bit for bit" in out
    assert re.search(r"^optimizer tensors +18 +0$", out, re.M)
    assert re.search(r"^state hooks.ema +7 +0$", out, re.M)
    assert re.search(r"^generators +3 +0$", out, re.M)


def test_diff_names_the_first_tensor_and_its_distance(trained, work, run):
    def change(sections):
        sections["optimizer"]["last.weight/exp_avg"][0, 0] += 0.5
        sections["model"]["norm.weight"][:2] += torch.tensor([0.25, 0.125])

    remake(work, "iter_14.pth", tensors=change)
    status, out, _ = run("diff", trained / "iter_14.pth", work / "iter_14.pth")
    assert status == 1
    assert re.search(r"^model tensors +9 +1$", out, re.M)
    assert "first difference\n  tensor model/norm.weight: max abs difference 0.25 in 2 of 8 elements" in out
    assert re.search(r"  tensor optimizer/last.weight/exp_avg +max abs difference 0.5 in 1 of 16 elements", out)


def test_diff_names_a_dotted_state_key_and_a_generator(trained, work, run):
    remake(work, "iter_14.pth", state=lambda state: state["hooks.Counter"].update(calls=15))
    remake(work, "iter_20.pth", rng=lambda rng: rng["generators"]["numpy"].update(position=3))
    status, out, _ = run("diff", trained / "iter_14.pth", work / "iter_14.pth")
    assert (status, "  state hooks.Counter.calls: 14 != 15" in out) == (1, True)
    status, out, _ = run("diff", trained / "iter_14.pth", work / "iter_14.pth", "--ignore", "hooks.Counter.*")
    assert status == 0
    status, out, _ = run("diff", trained, work)
    assert (status, "  generator numpy of rank 0: its state differs" in out) == (1, True)


def test_diff_names_what_only_one_has(trained, work, run):
    def change(state):
        state["hooks.New"] = {"a": 1}
        del state["hooks.Counter"]

    remake(work, "iter_20.pth", tensors=lambda sections: sections["model"].pop("norm.bias"), state=change)
    status, out, _ = run("diff", trained, work)
    assert status == 1
    assert "tensor model/norm.bias: only in A" in out
    assert re.search(r"state hooks.New.a +only in B", out)
    assert re.search(r"state hooks.Counter.calls +only in A", out)


def test_two_runs_of_one_config_are_equal_except_for_their_times(trained, hooks, tmp_path, run):
    make_runner(tmp_path / "again", custom_hooks=[{"type": "Counter"}], default_hooks=hooks).train()
    assert run("diff", trained, tmp_path / "again")[0] == 0
    assert run("diff", trained / "iter_14.pth", tmp_path / "again" / "iter_14.pth")[0] == 0


def test_diff_reports_different_configs(trained, hooks, tmp_path, run):
    optim = {"optimizer": {"type": "AdamW", "lr": 0.02}}
    make_runner(
        tmp_path / "again", custom_hooks=[{"type": "Counter"}], default_hooks=hooks, optim_wrapper=optim
    ).train()
    status, out, _ = run("diff", trained, tmp_path / "again")
    assert status == 1
    assert out.rstrip().endswith("(not counted as a difference)\n  optim_wrapper.optimizer.lr: 0.01 != 0.02")
    assert "more; --all lists them" in out
    assert "more; --all" not in run("diff", trained, tmp_path / "again", "--all")[1]


# ---- prune
def test_prune(work, run):
    best = {"accuracy": {"value": 1.0, "checkpoint": "iter_10.pth", "iteration": 10}}
    (work / "best.json").write_text(json.dumps(best))
    status, out, _ = run("prune", work, "--keep", "1", "--dry-run")
    assert status == 0
    assert [line.split(" (")[0] for line in out.splitlines()[:-1]] == [
        "would delete iter_7.pth", "would delete iter_14.pth",
    ]  # fmt: skip
    assert CheckpointStore(work).names() == ["iter_7.pth", "iter_10.pth", "iter_14.pth", "iter_20.pth"]
    status, out, _ = run("prune", work, "--keep", "1", "--keep-every", "7")
    assert (status, out) == (0, "kept 4 checkpoints, freed 0 B\n")
    status, out, _ = run("prune", work, "--keep", "1")
    assert re.fullmatch(r"kept 2 checkpoints, freed [\d.]+ KB", out.splitlines()[-1])
    assert CheckpointStore(work).names() == ["iter_10.pth", "iter_20.pth"]


def test_prune_creates_nothing_in_a_directory_without_checkpoints(tmp_path, run):
    assert run("prune", tmp_path, "--keep", "1") == (0, f"there is no checkpoint in {tmp_path}\n", "")
    assert list(tmp_path.iterdir()) == []


def test_prune_leaves_copies_alone(work, run):
    (work / "best.json").unlink(missing_ok=True)
    shutil.copytree(work / "iter_7.pth", work / "before_lr_change")
    status, out, _ = run("prune", work, "--keep", "1")
    assert status == 0
    assert "left alone: before_lr_change was not saved under this name" in out
    assert sorted(CheckpointStore(work).names()) == ["before_lr_change", "iter_20.pth"]


def test_prune_never_deletes_the_newest_good_one(work, run):
    (work / "best.json").unlink(missing_ok=True)
    damaged = damage(work / "iter_20.pth")  # of the right size: only hashes show it
    status, out, _ = run("prune", work, "--keep", "1")
    assert status == 0
    assert f"left alone: iter_20.pth/{damaged}" in out
    assert CheckpointStore(work).names() == ["iter_14.pth", "iter_20.pth"]


def test_prune_refuses_a_work_dir_that_a_run_is_writing(work, run):
    with WorkDirLock(work).acquire():
        status, _, err = run("prune", work, "--keep", "1")
    assert status == 1
    assert "is already in use" in err
    assert len(CheckpointStore(work).names()) == 4


# ---- bad input
def test_missing_paths_are_reported(work, tmp_path, run):
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.pth").write_bytes(b"x")
    for arguments, message in {
        ("show", tmp_path / "none"): "none does not exist; expected a work dir or a checkpoint",
        ("show", tmp_path / "empty"): f"there is no checkpoint in {tmp_path / 'empty'}",
        ("verify", tmp_path / "empty"): f"there is no checkpoint in {tmp_path / 'empty'}",
        ("diff", work, tmp_path / "weights.pth"): "weights.pth is a file; expected a work dir",
        ("list", work / "iter_7.pth"): "iter_7.pth is a checkpoint; expected the directory that contains it",
        ("prune", work, "--keep", "0"): "--keep is 0; expected 1 or more",
        ("export", work, tmp_path / "empty"): "empty exists and is a directory",
    }.items():
        status, out, err = run(*arguments)
        assert (status, out) == (2, ""), arguments
        assert message in err
        assert len(err.strip().splitlines()) == 1


def test_a_damaged_one_is_skipped_or_refused(work, tmp_path, run):
    (work / "iter_20.pth" / "tensors.json").write_text("")
    status, out, err = run("show", work)
    assert (status, out.splitlines()[0]) == (0, str(work / "iter_14.pth"))
    assert err.startswith("skipped: iter_20.pth/tensors.json: 0 bytes instead of ")
    status, _, err = run("show", work / "iter_20.pth")
    assert (status, "is damaged: tensors.json: 0 bytes" in err) == (1, True)
    damage(work / "iter_14.pth")
    assert run("export", work / "iter_14.pth", tmp_path / "x.pth")[0] == 1
    for path in work.glob("iter_*"):
        (path / "manifest.json").write_text("{}")
    status, _, err = run("show", work)
    assert (status, "every checkpoint in" in err, err.count("manifest.json")) == (1, True, 4)


def test_reading_commands_change_nothing(work, run):
    leftover = work / ".iter_9.pth.tmp-00-00-1-1-00"
    leftover.mkdir()
    before = sorted(work.rglob("*"))
    for arguments in (["list", work], ["show", work], ["verify", work], ["diff", work, work]):
        assert run(*arguments)[0] == 0
    run("prune", work, "--keep", 1, "--dry-run")
    assert sorted(work.rglob("*")) == before


def test_wrong_usage_and_the_real_command(trained):
    tool = [sys.executable, str(ROOT / "tools" / "checkpoint.py")]
    wrong = subprocess.run([*tool, "lisst"], capture_output=True, text=True, check=False)
    assert (wrong.returncode, "invalid choice: 'lisst'" in wrong.stderr) == (2, True)
    found = subprocess.run([*tool, "verify", str(trained / "iter_7.pth")], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout.startswith("good     iter_7.pth (7 files, ")) == (0, True)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_output_pipe_ends_the_command_quietly(trained, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(ROOT / "tools" / "checkpoint.py"), "show", str(trained), "--tensors"]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    found = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False, env=environment)
    os.close(writer)
    assert (found.returncode, found.stderr) == (141, "")


def test_sizes_and_counts_as_text():
    assert [size(n) for n in (0, 999, 1000, 10_340, 999_960, 1_234_000_000)] == [
        "0 B", "999 B", "1.0 KB", "10.3 KB", "1.0 MB", "1.2 GB",
    ]  # fmt: skip
    assert (counted(1, "file"), counted(2000, "process", "processes")) == ("1 file", "2,000 processes")
