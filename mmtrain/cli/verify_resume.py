"""``mmtrain verify-resume CONFIG``: check that a killed run of a config resumes bit-for-bit.

The config runs twice in real processes: once undisturbed, and once killed with SIGKILL and started again by the same
command. Everything that both runs leave behind is compared bit for bit.
"""

import argparse
import shutil
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtrain.cli.errors import run_command
from mmtrain.cli.options import HelpFormatter, add_cfg_options, add_debug
from mmtrain.errors import ConfigError

if TYPE_CHECKING:
    from mmtrain.verify_resume.compare import RunComparison
    from mmtrain.verify_resume.runs import FinishedRun, TrialCommand
    from mmtrain.verify_resume.trial import Trial

_WIDTH = 80
_START_MODULE = "mmtrain.cli.trial"
_EPILOG = """\
examples:
  mmtrain verify-resume configs/gpt/tiny.py
  mmtrain verify-resume configs/gpt/tiny.py --steps 60 --kills 3
  mmtrain verify-resume configs/gpt/stdlib_ddp.py --nproc-per-node 2

The runs are stopped after --steps iterations; schedules are still those of the
full run. To include a validation, make one due within these iterations:
--cfg-options train_cfg.val_interval=10

exit status:
  0 the runs are identical, 1 they differ, 2 config or command-line error
"""


def make_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="mmtrain verify-resume",
        description="Check that a killed run resumes bit-for-bit: run the config once undisturbed,\n"
        "run it again but kill it with SIGKILL and restart it, then compare the logs and\n"
        "checkpoints of both.",
        epilog=_EPILOG,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("config", help="config file")
    parser.add_argument("--steps", type=int, metavar="N", help="iterations of each run (default: 20, or four updates)")
    parser.add_argument("--at", type=int, metavar="K", help="iteration of the first kill (default: after two thirds)")
    parser.add_argument("--kills", type=int, default=1, metavar="N", help="number of kills (default: 1)")
    parser.add_argument(
        "--nproc-per-node", type=int, default=0, metavar="N",
        help="run N processes with torchrun; a kill ends all of them (default: one process)",
    )  # fmt: skip
    parser.add_argument(
        "--ignore", nargs="+", default=[], metavar="PATTERN",
        help="logged names and state to leave out of the comparison, such as a measured speed (* and ? as in a shell)",
    )  # fmt: skip
    parser.add_argument(
        "--work-dir", metavar="DIR", help="new directory for both runs (default: a temporary one, deleted afterwards)"
    )
    parser.add_argument("--keep", action="store_true", help="keep the temporary directory")
    add_cfg_options(parser)
    add_debug(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = make_parser().parse_args(argv)

    def command() -> int:
        with _folder(arguments.work_dir, keep=arguments.keep) as folder:
            return verify(arguments, folder)

    return run_command(command, debug=arguments.debug)


@contextmanager
def _folder(work_dir: str | None, *, keep: bool) -> Iterator[Path]:
    """The directory for both runs. One that the user names must be new or empty, and is kept."""
    if work_dir is not None:
        folder = Path(work_dir).expanduser()
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"--work-dir {folder} exists and is not empty; choose a new directory")
        folder.mkdir(parents=True, exist_ok=True)
    else:
        folder = Path(tempfile.mkdtemp(prefix="mmtrain-verify-resume-"))
    try:
        yield folder
    finally:
        if work_dir is None and not keep:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            print(f"The runs are in {folder}")


def verify(arguments: argparse.Namespace, folder: Path) -> int:
    """Run both, compare them, print the table and the result; return 0 if they are bit-for-bit equal, else 1."""
    from mmtrain.cli.checkpoint.diff import group_table
    from mmtrain.verify_resume.compare import compare_runs
    from mmtrain.verify_resume.runs import run_trial

    command, trial = _plan(arguments)
    without_kills = replace(trial, kills=())
    print(f"{arguments.config}, {trial.stop} iterations, seed {command.seed}")
    undisturbed = run_trial(command, without_kills, folder / "undisturbed")
    print(f"  undisturbed  {undisturbed.seconds:5.1f} s")
    killed = run_trial(command, trial, folder / "killed")
    kills = ", ".join(map(str, trial.kills))
    resumed = ", ".join(map(str, killed.resumed_at))
    print(f"  killed       {killed.seconds:5.1f} s  SIGKILL after iteration {kills}; resumed at iteration {resumed}\n")
    comparison = compare_runs(undisturbed, killed, ignore=arguments.ignore)
    print("\n".join(group_table(comparison.groups)))
    if comparison.first is None:
        print("\nEXACT: the killed run is identical to the undisturbed run, bit for bit")
        return 0
    again = run_trial(command, without_kills, folder / "undisturbed_again")
    reproducible = compare_runs(undisturbed, again, ignore=arguments.ignore).first is None
    _explain(comparison, killed, reproducible=reproducible)
    return 1


def _explain(comparison: "RunComparison", killed: "FinishedRun", *, reproducible: bool) -> None:
    from mmtrain.verify_resume.compare import likely_causes

    assert comparison.first is not None
    order = " (undisturbed != killed)" if " != " in comparison.first.how else ""
    print(f"\nDIFFERENT, first in {comparison.first}{order}")
    if comparison.iteration is not None and comparison.iteration - 1 in killed.resumed_at:
        print(f"That is the first iteration after the resume at iteration {comparison.iteration - 1}.")
    if reproducible:
        print("A second undisturbed run was identical to the first, so the resume is not exact. Likely causes:")
    else:
        print("A second undisturbed run differed too, so the run itself is not reproducible. Likely causes:")
    for cause in likely_causes(comparison, killed, killed.starts[-1], reproducible=reproducible):
        print(textwrap.fill(cause, _WIDTH, initial_indent="  - ", subsequent_indent="    "))


def _plan(arguments: argparse.Namespace) -> tuple["TrialCommand", "Trial"]:
    """The command and the trial for the user's config. Raises ConfigError for numbers that do not fit together."""
    from mmtrain.config import load_config, parse_overrides
    from mmtrain.randomness import draw_seed
    from mmtrain.verify_resume.runs import TrialCommand
    from mmtrain.verify_resume.trial import Trial

    cfg: Any = load_config(arguments.config, parse_overrides(arguments.cfg_options))
    if arguments.nproc_per_node < 0:
        raise ConfigError(f"--nproc-per-node is {arguments.nproc_per_node}; expected 1 or more")
    if cfg.get("launcher") not in (None, "none") and not arguments.nproc_per_node:
        raise ConfigError(f"launcher is {cfg['launcher']!r}; give the number of processes with --nproc-per-node N")
    window = int((cfg.get("optim_wrapper") or {}).get("accumulative_counts", 1))
    steps = arguments.steps if arguments.steps is not None else max(20, 4 * window)
    steps = min(steps, (cfg.get("train_cfg") or {}).get("max_iters") or steps)
    kills = kill_points(steps, arguments.kills, at=arguments.at)
    seed = (cfg.get("randomness") or {}).get("seed")
    command = TrialCommand(
        module=_START_MODULE,
        config=arguments.config,
        seed=draw_seed() if seed is None else int(seed),
        cfg_options=tuple(arguments.cfg_options),
        processes=arguments.nproc_per_node,
    )
    return command, Trial(stop=steps, interval=checkpoint_interval(steps, kills[0], window=window), kills=kills)


def kill_points(steps: int, kills: int, *, at: int | None = None) -> tuple[int, ...]:
    """The iterations of the kills: the first is ``at``, the others are spread evenly between it and the end.

    Raises ConfigError if they do not fit into ``steps`` iterations.
    """
    if kills < 1:
        raise ConfigError(f"--kills is {kills}; expected 1 or more")
    first = at if at is not None else max(2, 2 * steps // (kills + 2))
    if not 2 <= first < steps:
        raise ConfigError(
            f"the first kill is at iteration {first}, but must be between 2 and {steps - 1} in a run of {steps} "
            "iterations; change --at or --steps"
        )
    if kills > steps - first:
        raise ConfigError(f"{kills} kills after iteration {first} do not fit into {steps} iterations; raise --steps")
    return tuple(first + index * (steps - first) // kills for index in range(kills))


def checkpoint_interval(steps: int, first_kill: int, *, window: int) -> int:
    """Iterations between checkpoints: full windows, about a quarter of the run, and one checkpoint before the kill.

    Raises ConfigError if the first update ends too late for that.
    """
    interval = max(1, min(steps // 4, first_kill - 1) // window) * window
    if interval >= first_kill:
        raise ConfigError(
            f"the kill at iteration {first_kill} comes before the first checkpoint (an update takes {window} "
            "iterations); choose a later iteration with --at, or raise --steps"
        )
    return interval
