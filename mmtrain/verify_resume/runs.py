"""The runs of `verify-resume`: real processes, started like anybody's, one of them killed and started again."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmtrain.errors import ConfigError, RunError
from mmtrain.verify_resume.hook import STARTS
from mmtrain.verify_resume.trial import Trial

_PACKAGE_ROOT = Path(__file__).resolve().parents[2]
_TAIL = 12


@dataclass(frozen=True)
class Command:
    """What is run: the config with the user's options, and the trial that is put into it.

    ``processes``: how many torchrun starts on this machine; 0 for one process without it.
    """

    config: str
    trial: Trial
    seed: int
    cfg_options: tuple[str, ...] = ()
    processes: int = 0


@dataclass
class Run:
    """A run that reached its end: where it lies, how long its starts took together, and what they noted."""

    work_dir: Path
    seconds: float
    starts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def resumed_at(self) -> list[int]:
        """The iterations at which the starts after the first one went on."""
        return [start["iteration"] for start in self.starts[1:]]


def run_through(command: Command, folder: Path) -> Run:
    """Run to the end in ``folder``, started again after every kill of the trial.

    Raises RunError, or ConfigError where the run says that its config is wrong, with the last lines it printed.
    """
    record = folder / "record"
    record.mkdir(parents=True)
    trial = replace(command.trial, record=str(record.resolve()))
    began = time.perf_counter()
    for number, kill in enumerate([*trial.kills, None], 1):
        output = folder / f"start_{number}.txt"
        status = _start(replace(command, trial=trial), folder / "run", output)
        if kill is not None and status == 0:
            raise RunError(f"the run ended before the kill at iteration {kill}; choose an earlier one with --at")
        killed = status == -signal.SIGKILL or (command.processes > 0 and (record / f"killed_{kill}").exists())
        if (status != 0) if kill is None else not killed:
            raise _failure(status, output, f"start {number} of the run")
    starts = [json.loads(line) for line in (record / STARTS).read_text(encoding="utf-8").splitlines()]
    run = Run(folder / "run", time.perf_counter() - began, starts)
    if 0 in run.resumed_at:
        raise RunError(
            f"the run began anew after a kill: it found no checkpoint, see {folder / 'start_1.txt'} (--keep)"
        )
    return run


def _start(command: Command, work_dir: Path, output: Path) -> int:
    """One start; everything it prints goes to ``output``. Returns the exit status, negative for a signal."""
    options = [command.config, "--work-dir", str(work_dir), "--resume", "auto", "--seed", str(command.seed)]
    if command.cfg_options:
        options += ["--cfg-options", *command.cfg_options]
    if command.processes:
        options += ["--launcher", "pytorch"]
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={command.processes}", "-m"]
    module = [*(torchrun if command.processes else ()), "mmtrain.verify_resume.trial"]
    line = [sys.executable, "-m", *module, command.trial.to_json(), *options]
    search = [str(_PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # tools/ work without an installation
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(search)}
    with output.open("wb") as file:
        return subprocess.run(line, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False).returncode


def _failure(status: int, output: Path, what: str) -> Exception:
    lines = [line for line in output.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    told = next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), None)
    if status == ConfigError.exit_status and told is not None:
        return ConfigError(told)
    if told is not None and any("torch.distributed.elastic" in line for line in lines):  # what follows is torchrun's
        return RunError(f"{what} failed: {told}")
    tail = "\n  ".join(lines[-_TAIL:])
    ended = f"was ended by signal {-status}" if status < 0 else f"failed with status {status}"
    return RunError(f"{what} {ended}; it last printed:\n  {tail}")
