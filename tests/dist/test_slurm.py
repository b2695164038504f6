"""tools/slurm_train.sbatch, run by bash as SLURM would, with programs that replace srun and scontrol."""

import os
import signal
import subprocess
import sys

import pytest
from commands import run, write_config
from exactness import assert_same, left_behind
from ranks import ROOT, environment

SCRIPT = ROOT / "tools" / "slurm_train.sbatch"
SRUN = """
import os, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
place = {"SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "node[1-1]"}
tasks = [
    subprocess.Popen(command, env={**os.environ, **place, "SLURM_PROCID": str(k), "SLURM_LOCALID": str(k)})
    for k in range(int(os.environ["SLURM_NTASKS"]))
]
with open(os.environ["STAND_IN"] + "/tasks", "w") as file:
    file.write(" ".join(str(task.pid) for task in tasks))
sys.exit(max(code if code >= 0 else 128 - code for code in [task.wait() for task in tasks]))
"""
SCONTROL = """
import os, sys
if sys.argv[1:3] == ["show", "hostnames"]:
    print("127.0.0.1")
else:
    with open(os.environ["STAND_IN"] + "/scontrol", "a") as file:
        file.write(" ".join(sys.argv[1:]) + "\\n")
"""


class Cluster:
    """One job: starts the script as SLURM does, signals the tasks of srun, and records the calls of scontrol."""

    def __init__(self, folder, job, tasks=2):
        self.folder = folder
        self.job = str(job)
        self.restarts = 0
        kept = {k: v for k, v in environment(0, 1, 1).items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        kept = {k: v for k, v in kept.items() if not k.startswith("MASTER_")}
        self.variables = {
            **kept, "PATH": f"{folder}/bin:{os.environ['PATH']}", "STAND_IN": str(folder),
            "SLURM_JOB_ID": self.job, "SLURM_NTASKS": str(tasks),
        }  # fmt: skip
        (folder / "bin").mkdir()
        self.install("srun", SRUN)
        self.install("scontrol", SCONTROL)
        (folder / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        (folder / "bin" / "python").chmod(0o755)

    def install(self, name, code):
        path = self.folder / "bin" / name
        path.write_text(f"#!{sys.executable}\n{code}")
        path.chmod(0o755)

    def start(self, *arguments):
        variables = {**self.variables, "SLURM_RESTART_COUNT": str(self.restarts)}
        self.restarts += 1
        return subprocess.Popen(
            ["bash", str(SCRIPT), *map(str, arguments)], cwd=ROOT, env=variables, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def signal(self, number):
        """What ``--signal`` without ``B:`` does: every task gets it, the batch shell does not."""
        for pid in (self.folder / "tasks").read_text().split():
            os.kill(int(pid), number)

    @property
    def requests(self):
        path = self.folder / "scontrol"
        return path.read_text().splitlines() if path.exists() else []


def test_the_script_is_correct_bash():
    assert subprocess.run(["bash", "-n", str(SCRIPT)], check=False).returncode == 0
    text = SCRIPT.read_text()
    for option in ("--signal=USR1@120", "--requeue", "--open-mode=append"):
        assert f"#SBATCH {option}\n" in text


@pytest.mark.parametrize(("status", "requests"), [(75, ["requeue 4711"]), (0, []), (1, []), (2, []), (130, [])])
def test_only_status_75_is_requeued(tmp_path, status, requests):
    cluster = Cluster(tmp_path, 4711)
    cluster.install("srun", f"import sys; sys.exit({status})")
    process = cluster.start("config.py")
    process.communicate(timeout=120)
    assert process.returncode == status
    assert cluster.requests == requests


def test_the_shell_survives_a_signal(tmp_path):
    cluster = Cluster(tmp_path, 4712)
    cluster.install("srun", "import os, signal, sys; os.kill(os.getppid(), signal.SIGUSR1); sys.exit(75)")
    process = cluster.start("config.py")
    process.communicate(timeout=120)
    assert process.returncode == 75
    assert cluster.requests == ["requeue 4712"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=["time limit", "preemption"])
def test_a_signalled_job_is_requeued_and_ends_the_same(tmp_path, number):
    statuses, errors, _ = run(write_config(tmp_path, "uninterrupted"))
    assert statuses == [0, 0], errors
    hold = {"type": "HoldAt", "iteration": 15, "marker": str(tmp_path / "go")}
    path = write_config(tmp_path, "queued", custom_hooks=[hold])
    cluster = Cluster(tmp_path, os.getpid())

    first = cluster.start(path)
    lines = []
    for line in first.stderr:
        lines.append(line)
        if "holding" in line:
            break
    else:
        pytest.fail("".join(lines))
    cluster.signal(number)
    (tmp_path / "go").touch()
    _, rest = first.communicate(timeout=180)
    assert first.returncode == 75, rest
    assert f"{signal.Signals(number).name} received" in rest
    assert cluster.requests == [f"requeue {os.getpid()}"]

    again = cluster.start(path)
    _, errors = again.communicate(timeout=180)
    assert again.returncode == 0, errors
    assert "Auto resumed from the latest checkpoint" in errors
    assert cluster.requests == [f"requeue {os.getpid()}"]
    assert_same(left_behind(tmp_path / "uninterrupted"), left_behind(tmp_path / "queued"))
