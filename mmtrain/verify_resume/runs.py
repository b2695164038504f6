"""The runs of ``verify-resume``: real processes, killed and started again by the same command."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmtrain.errors import ConfigError, RunError
from mmtrain.verify_resume.hook import STARTS
from mmtrain.verify_resume.trial import Trial

_PACKAGE_ROOT = Path(__file__).resolve().parents[2]
_TAIL = 12
StartProcess = Callable[[Sequence[str], Path], int]


@dataclass(frozen=True)
class TrialCommand:
    """The command that starts or resumes a run, as a scheduler would repeat it.

    Args:
        module: run as ``python -m MODULE TRIAL TRAIN_OPTIONS...``; ``TRIAL`` is a `Trial` as JSON.
        config: path of the config file.
        seed: given to both runs, even if the config has none.
        cfg_options: the user's ``--cfg-options``.
        processes: number of processes for torchrun; 0 for one process without torchrun.
    """

    module: str
    config: str
    seed: int
    cfg_options: tuple[str, ...] = ()
    processes: int = 0

    def line(self, trial: Trial, work_dir: Path) -> list[str]:
        """The command line."""
        options = [self.config, "--work-dir", str(work_dir), "--resume", "auto", "--seed", str(self.seed)]
        if self.cfg_options:
            options += ["--cfg-options", *self.cfg_options]
        launcher = []
        if self.processes:
            options += ["--launcher", "pytorch"]
            launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={self.processes}", "-m"]
        return [sys.executable, "-m", *launcher, self.module, trial.to_json(), *options]


@dataclass
class FinishedRun:
    """A run that reached the end of its trial.

    ``seconds`` is the wall time of all its starts; ``starts`` holds what `ResumeTrialHook` recorded of each.
    """

    work_dir: Path
    seconds: float
    starts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def resumed_at(self) -> list[int]:
        """The iterations at which the second and later starts resumed."""
        return [start["iteration"] for start in self.starts[1:]]


def start_process(line: Sequence[str], output: Path) -> int:
    """Run a command, with its output in the file ``output``; return the exit status, negative for a signal."""
    search = [str(_PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # tools/ work without an installation
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(search)}
    with output.open("wb") as file:
        return subprocess.run(line, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False).returncode


def run_trial(command: TrialCommand, trial: Trial, folder: Path, *, start: StartProcess = start_process) -> FinishedRun:
    """Run to the end of the trial in ``folder``, with a new start after every kill.

    Raises RunError, or ConfigError if the run reports an error in its config, with the last lines of its output.
    """
    record = folder / "record"
    record.mkdir(parents=True)
    line = command.line(replace(trial, record=str(record.resolve())), folder / "run")
    began = time.perf_counter()
    for number, kill in enumerate([*trial.kills, None], 1):
        output = folder / f"start_{number}.txt"
        status = start(line, output)
        if kill is not None and status == 0:
            raise RunError(f"the run ended before the kill at iteration {kill}; choose an earlier one with --at")
        killed = status == -signal.SIGKILL or (command.processes > 0 and (record / f"killed_{kill}").exists())
        if (status != 0) if kill is None else not killed:
            raise _failure(status, output, f"start {number} of the run")
    starts = [json.loads(text) for text in (record / STARTS).read_text(encoding="utf-8").splitlines()]
    run = FinishedRun(folder / "run", time.perf_counter() - began, starts)
    if 0 in run.resumed_at:
        raise RunError(
            f"the run started from scratch after a kill because it found no checkpoint; see {folder / 'start_1.txt'} "
            "(kept with --keep)"
        )
    return run


def _failure(status: int, output: Path, what: str) -> Exception:
    lines = [line for line in output.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    reported = next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), None)
    if status == ConfigError.exit_status and reported is not None:
        return ConfigError(reported)
    if reported is not None and any("torch.distributed.elastic" in line for line in lines):
        return RunError(f"{what} failed: {reported}")  # the last lines are torchrun's
    tail = "\n  ".join(lines[-_TAIL:])
    ended = f"was killed by signal {-status}" if status < 0 else f"failed with exit status {status}"
    return RunError(f"{what} {ended}. Its last output:\n  {tail}")
