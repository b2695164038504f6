"""The work directory is deleted under a live run; the order of log directories."""

import json
import shutil
import subprocess
import sys
import time
from collections import Counter

import pytest
from parts import make_runner

from mmtrain.checkpoint import CheckpointStore
from mmtrain.checkpoint.format.manifest import decode, encode
from mmtrain.errors import RunError

HOLD = """
import sys
from mmtrain.checkpoint import WorkDirLock
WorkDirLock(sys.argv[1]).acquire()
print("held", flush=True)
sys.stdin.read()
"""


class Deletes:
    """Deletes the work directory after iteration 6, when no save is in flight; another run may take it then."""

    priority = "LOWEST"

    def __init__(self, work_dir, *, taken):
        self.work_dir, self.taken, self.other = work_dir, taken, None

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == 6:
            runner.checkpointer.finish(runner)
            shutil.rmtree(self.work_dir)
            if self.taken:
                self.other = subprocess.Popen(
                    [sys.executable, "-c", HOLD, str(self.work_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
                )
                assert self.other.stdout.readline() == b"held\n"

    def end(self):
        self.other.communicate()


HOOK = {"checkpoint": {"type": "CheckpointHook", "interval": 5, "weights_interval": 10}}


def test_a_run_whose_directory_is_deleted_saves_in_a_new_one(tmp_path, capfd):
    work = tmp_path / "work"
    make_runner(work, default_hooks=HOOK, custom_hooks=[Deletes(work, taken=False)]).train()
    told = capfd.readouterr().err
    assert told.count("was deleted or replaced while this run used it; it continues in a new one") == 1
    assert CheckpointStore(work).names() == ["iter_10.pth", "iter_15.pth", "iter_20.pth"]
    assert (work / "weights" / "iter_10.safetensors").exists()
    (scalars,) = work.glob("*/vis_data/scalars.json")
    steps = [json.loads(line)["step"] for line in scalars.read_text().splitlines()]
    assert steps[-1] == 20
    assert set(range(12, 21)) <= set(steps)
    make_runner(work, default_hooks=HOOK, resume=True, train_cfg={"max_iters": 22}).train()
    assert CheckpointStore(work).names()[-1] == "iter_22.pth"


@pytest.mark.parametrize("interval", [10, 50])
def test_a_run_whose_directory_belongs_to_another_run_now_ends_and_writes_nothing_there(tmp_path, interval):
    """At the save of weights, or at that of the last checkpoint."""
    work = tmp_path / "work"
    deletes = Deletes(work, taken=True)
    hook = {"checkpoint": {"type": "CheckpointHook", "interval": 50, "weights_interval": interval}}
    runner = make_runner(work, default_hooks=hook, custom_hooks=[deletes])
    with pytest.raises(RunError, match="was deleted or replaced while this run used it, and is in use by process"):
        runner.train()
    assert [path.name for path in work.iterdir()] == [".lock"]
    assert json.loads((work / ".lock").read_text())["pid"] == deletes.other.pid
    deletes.end()


# ---- the order of starts
@pytest.fixture
def zone(monkeypatch):
    """Sets the time zone in which log directories are named."""

    def set_zone(name):
        monkeypatch.setenv("TZ", name)
        time.tzset()

    yield set_zone
    monkeypatch.undo()
    time.tzset()


def lines_of_each_step(work):
    found = Counter()
    for path in work.glob("*/vis_data/scalars.json"):
        lines = map(json.loads, path.read_text().splitlines())
        found.update(line["step"] for line in lines if line["mode"] == "train")
    return found


@pytest.mark.parametrize("zones", [("UTC-9", "UTC", "UTC+9"), ("UTC+9", "UTC", "UTC-9"), ("UTC", "UTC-9", "UTC+9")])
def test_no_step_is_logged_twice_when_the_local_time_changes(tmp_path, zone, zones):
    """Each start of a run is stopped past its newest checkpoint; the names of their directories are in any order."""
    hook = {"checkpoint": {"type": "CheckpointHook", "interval": 5, "save_last": False}}
    for number, name in enumerate(zones):
        zone(name)
        make_runner(tmp_path, default_hooks=hook, resume=True, train_cfg={"max_iters": 8 + 5 * number}).train()
    assert lines_of_each_step(tmp_path) == dict.fromkeys(range(1, 19), 1)


def test_logs_of_another_run_in_the_directory_stay_whole_whatever_their_names(tmp_path, zone):
    hook = {"checkpoint": {"type": "CheckpointHook", "interval": 5, "save_last": False}}
    zone("UTC-9")
    make_runner(tmp_path, default_hooks=hook, train_cfg={"max_iters": 18}).train()
    zone("UTC")
    make_runner(tmp_path, default_hooks=hook, train_cfg={"max_iters": 8}).train()
    zone("UTC+9")
    make_runner(tmp_path, default_hooks=hook, resume=True, train_cfg={"max_iters": 13}).train()
    assert lines_of_each_step(tmp_path) == {step: 1 + (step <= 13) for step in range(1, 19)}


def test_a_run_that_an_earlier_version_began_is_continued(tmp_path, zone):
    """Its notes and checkpoints name no run and no number: its log directories are known by their names."""
    hook = {"checkpoint": {"type": "CheckpointHook", "interval": 5, "save_last": False, "max_keep_ckpts": 1}}
    make_runner(tmp_path, default_hooks=hook, train_cfg={"max_iters": 8}).train()
    (note,) = tmp_path.glob("*/vis_data/start_position")
    noted = json.loads(note.read_text())
    note.write_text(json.dumps({name: noted[name] for name in noted if name not in ("run", "start")}))
    manifest = tmp_path / "iter_5.pth" / "manifest.json"
    document = decode(manifest.read_bytes())
    del document.meta["run"]
    manifest.write_bytes(encode(document))
    for number, name in enumerate(["UTC-9", "UTC+9"], 1):
        zone(name)
        make_runner(tmp_path, default_hooks=hook, resume=True, train_cfg={"max_iters": 8 + 5 * number}).train()
    assert lines_of_each_step(tmp_path) == dict.fromkeys(range(1, 19), 1)
    assert CheckpointStore(tmp_path).names() == ["iter_15.pth"]
