"""The work directory is deleted under a live run; the order of log directories."""

import json
import shutil
import subprocess
import sys

import pytest
from parts import make_runner

from mmtrain.checkpoint import CheckpointStore
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
