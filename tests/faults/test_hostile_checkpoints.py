"""Whatever is in a checkpoint's directory: one line that names it, the right exit status; no traceback, no hang."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hostile_files import DOCUMENTS, broken_bytes, changed_documents, other_kinds, write, write_bytes
from limits import limited
from parts import config, make_runner

from mmtrain.checkpoint import CheckpointStore
from mmtrain.checkpoint.discover import scan
from mmtrain.cli.checkpoint import main
from mmtrain.errors import CheckpointError, MMTrainError
from mmtrain.runner import FlexibleRunner

ROOT = Path(__file__).resolve().parents[2]
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
COMMANDS = ("list", "verify", "show")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The work dir of a run: iter_7, iter_14 and iter_20, each with hooks, averages and two kinds of generators."""
    work = tmp_path_factory.mktemp("hostile") / "work"
    hooks = {"ema": {"type": "EMAHook", "momentum": 0.1}}
    make_runner(work, custom_hooks=[{"type": "Counter"}], default_hooks=hooks).train()
    return work


@pytest.fixture
def work(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "work", symlinks=True))


@pytest.fixture(autouse=True)
def _nothing_takes_long_or_much():
    """A hang ends in an error after a minute, which `look` and its like begin."""
    with limited():
        yield


def look(path, capsys):
    """Everything that reads a checkpoint without a run. Returns whether a full verification finds it good."""
    signal.alarm(60)
    entries, problems = scan(path.parent, verify="full")
    good = path.name in {entry.name for entry in entries}
    named = [problem for problem in problems if problem.checkpoint == path.name]
    assert good == (not named)
    assert len({str(problem) for problem in named}) == len(named)
    for problem in named:
        assert not CONTROL.search(str(problem))
        assert "\n" not in str(problem)
    for command in COMMANDS:
        capsys.readouterr()
        status = main([command, str(path.parent if command == "list" else path)])
        out, err = capsys.readouterr()
        assert "Traceback" not in err, f"{command}: {err}"
        assert not CONTROL.search(out + err), command
        assert status == {"list": 0, "verify": 0 if good else 1}.get(command, status), command
        assert status in (0, 1), f"{command}: {err}"
        assert err.count("error: ") == (status == 1 and command == "show"), f"{command}: {err}"
    assert CheckpointStore(path.parent).pointer() is not None
    with contextlib.suppress(CheckpointError):
        checkpoint = CheckpointStore(path.parent).open(path.name, "size")
        checkpoint.state()
        checkpoint.rng()
        for name in checkpoint.tensor_names("model"):
            checkpoint.read("model", name)
    signal.alarm(60)
    return good


def sweep(directory, count, seed):
    """``count`` of the changes of documents, drawn with a seed: as many of each."""
    changes = [*changed_documents(directory)]
    generator = random.Random(seed)
    by_file = {file: [one for one in changes if one[0] == file] for file in DOCUMENTS}
    return [one for some in by_file.values() for one in generator.sample(some, min(count // len(by_file), len(some)))]


def undamaged(original, target):
    shutil.rmtree(target)
    shutil.copytree(original, target, symlinks=True)


def check_documents(work, trained, capsys, count, seed):
    for name in ("iter_7.pth", "iter_14.pth"):  # one is enough beside it
        shutil.rmtree(work / name)
    path = work / "iter_20.pth"
    found = {True: 0, False: 0}
    changes = sweep(path, count, seed)
    for file, what, document in changes:
        undamaged(trained / path.name, path)
        write(path, file, document)
        try:
            found[look(path, capsys)] += 1
        except BaseException as error:
            error.add_note(f"{file}: {what}")
            raise
    return found


def test_documents_with_a_wrong_value(work, trained, capsys):
    found = check_documents(work, trained, capsys, 80, seed=1)
    assert found[False] > 30, found  # a name, a text or a number may be another one: such a change does not damage


@pytest.mark.slow
def test_documents_with_many_wrong_values(work, trained, capsys):
    found = check_documents(work, trained, capsys, 2_000, seed=5)
    assert sum(found.values()) > 1_800, found


@pytest.mark.parametrize("file", DOCUMENTS)
def test_contents_that_are_no_document(work, trained, capsys, file):
    path = work / "iter_20.pth"
    for what, data in broken_bytes((path / file).read_bytes(), seed=2):
        undamaged(trained / path.name, path)
        write_bytes(path, file, data)
        assert not look(path, capsys) or what == "noise", what


@pytest.mark.parametrize("file", [*DOCUMENTS, "model/rank_00000_part_00000.safetensors", "state.safetensors"])
def test_what_is_not_a_file(work, trained, capsys, file):
    path = work / "iter_20.pth"
    for what in other_kinds(path):
        undamaged(trained / path.name, path)
        target = path / file
        target.unlink()
        other_kinds(target)[what]()
        assert not look(path, capsys), what


@pytest.mark.parametrize("name", ["best.json", "last_checkpoint"])
def test_odd_files_beside_the_checkpoints(work, capsys, name):
    for what in other_kinds(work):
        target = work / name
        if target.is_dir() and not target.is_symlink():
            target.rmdir()
        else:
            target.unlink(missing_ok=True)
        (work / "pipe").unlink(missing_ok=True)
        other_kinds(target)[what]()
        signal.alarm(60)
        capsys.readouterr()
        status = main(["list", str(work)])
        err = capsys.readouterr().err
        assert status == 0 or (status == 1 and err.count("error: ") == 1 and name == "best.json"), what
        assert "Traceback" not in err


def resumed(work):
    """Resume in this process; the sentence of its end, "" for a good one."""
    signal.alarm(120)
    cfg = config(work, custom_hooks=[{"type": "Counter"}], default_hooks={"ema": {"type": "EMAHook", "momentum": 0.1}})
    cfg = {**cfg, "resume": True, "train_cfg": {"by_epoch": False, "max_iters": 21, "val_interval": 10}}
    try:
        FlexibleRunner.from_cfg(cfg).train()
    except MMTrainError as error:
        assert not CONTROL.search(str(error))
        return str(error)
    return ""


def check_resumes(work, trained, count, seed):
    path = work / "iter_20.pth"
    ends = []
    for file, what, document in sweep(path, count, seed):
        if what.startswith("hooks.Counter") or (what.startswith("param_groups") and what.endswith("= 'True'")):
            continue  # a user's hook takes what it is given; and a flag of Adam's may be set, as amsgrad
        undamaged(trained, work)
        write(path, file, document)
        try:
            ends.append(resumed(work))
        except BaseException as error:
            error.add_note(f"{file}: {what}")
            raise
    return ends


def test_a_resume_skips_or_names_what_it_cannot_use(work, trained):
    ends = check_resumes(work, trained, 12, seed=3)
    assert ends.count("") >= 5  # an older one was there


@pytest.mark.slow
def test_a_resume_skips_or_names_whatever_is_wrong(work, trained):
    ends = check_resumes(work, trained, 200, seed=4)
    assert ends.count("") > 100


def train(folder, *options):
    """Run the real command on a run in ``folder/work``."""
    hooks = {"ema": {"type": "EMAHook", "momentum": 0.1}}
    cfg = config(folder / "work", custom_hooks=[{"type": "Counter"}], default_hooks=hooks)
    text = "custom_imports = dict(imports=['parts'])\n" + "".join(f"{key} = {value!r}\n" for key, value in cfg.items())
    (folder / "config.py").write_text(text)
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "train.py"), "config.py", *options], cwd=folder, text=True, timeout=150,
        capture_output=True, check=False, env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
    )  # fmt: skip


@pytest.mark.parametrize(
    "what",
    [
        "a pipe",
        "an index of itself",
        *(pytest.param(what, marks=pytest.mark.slow) for what in ("a link to a device", "a terabyte of zeros")),
    ],
)
def test_the_real_command_starts_from_no_odd_weights(what, tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    if what == "an index of itself":
        path.write_text(json.dumps({"weight_map": {"w\x1b[2J": path.name}}))
    else:
        other_kinds(path)[what]()
    result = train(tmp_path, "--cfg-options", f"load_from='{path}'")
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert not CONTROL.search(result.stderr)
    (sentence,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert path.name in sentence


def test_the_real_command_goes_on_from_an_older_checkpoint(trained, tmp_path):
    """A pipe, a device, a huge file and broken JSON in one directory, and a run that resumes past all of them."""
    work = Path(shutil.copytree(trained, tmp_path / "work"))
    for name, file, what in (
        ("iter_20.pth", "manifest.json", "a pipe"),
        ("iter_15.pth", "tensors.json", "a link to a device"),
        ("iter_16.pth", "manifest.json", "a terabyte of zeros"),
        ("iter_17.pth", "rng/rank_00000.json", "a link to a pipe"),
    ):
        if name != "iter_20.pth":
            shutil.copytree(work / "iter_14.pth", work / name)
        (work / name / file).unlink()
        other_kinds(work / name / file)[what]()
    shutil.copytree(work / "iter_14.pth", work / "iter_9\x1b[2J.pth")
    document = json.loads((work / "iter_14.pth" / "state.json").read_text())
    write(work / "iter_9\x1b[2J.pth", "state.json", {**document, "log": {"$float": "\x1b[2J"}})
    result = train(tmp_path, "--resume")
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert not CONTROL.search(result.stderr)
    assert result.stderr.count("Skipped a damaged checkpoint") == 5, result.stderr
    assert (work / "iter_20.pth" / "manifest.json").is_file()  # trained again from iter_14
