"""``mmtrain verify-resume CONFIG``: prove on a config of yours that a killed run resumes to the bit.

Two runs of the config in real processes: one undisturbed, one that is killed with SIGKILL and started again by the same
command. Everything that both leave behind is compared bit by bit.
"""

import argparse
import shutil
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmtrain.cli.errors import run_command
from mmtrain.errors import ConfigError

_WIDTH = 90


def make_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="mmtrain verify-resume",
        description="Run a config undisturbed, and killed with SIGKILL and started again; compare everything they "
        "leave behind bit by bit.",
        epilog="The schedules are those of the whole run: the trial is stopped, not shortened. A validation takes part "
        "where one falls due (--cfg-options train_cfg.val_interval=10). Exit status: 0 exact, 1 different, 2 for a "
        "wrong config or command line.",
    )  # fmt: skip
    parser.add_argument("config", help="the config file")
    parser.add_argument("--steps", type=int, metavar="N", help="iterations of each run (default: 20, or four updates)")
    parser.add_argument("--at", type=int, metavar="K", help="iteration of the first kill (default: after two thirds)")
    parser.add_argument("--kills", type=int, default=1, metavar="N", help="how often it is killed (default: 1)")
    parser.add_argument(
        "--nproc-per-node", type=int, default=0, metavar="N",
        help="run N processes with torchrun, all of which are killed (default: one process)",
    )  # fmt: skip
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="change the config")
    parser.add_argument(
        "--ignore", nargs="+", default=[], metavar="PATTERN",
        help="logged names and state that need not agree, such as speeds that a hook measures (*, ? as in a shell)",
    )  # fmt: skip
    parser.add_argument("--work-dir", help="a new directory for the runs (default: a temporary one, removed after)")
    parser.add_argument("--keep", action="store_true", help="leave the runs there to look at")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors that are told in one sentence")
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
    """Where the runs write. A directory of the user's must be new, and stays."""
    if work_dir is not None:
        folder = Path(work_dir).expanduser()
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"--work-dir {folder} exists and is not empty; the runs need a directory of their own")
        folder.mkdir(parents=True, exist_ok=True)
    else:
        folder = Path(tempfile.mkdtemp(prefix="mmtrain-verify-resume-"))
    try:
        yield folder
    finally:
        if work_dir is None and not keep:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            print(f"the runs are in {folder}")


def verify(arguments: argparse.Namespace, folder: Path) -> int:
    """Run both, compare, print the table and the verdict; returns 0 where they are the same to the bit, else 1."""
    from dataclasses import replace

    from mmtrain.cli.checkpoint.diff import group_table
    from mmtrain.verify_resume.compare import compare_runs
    from mmtrain.verify_resume.runs import run_through

    command = _command(arguments)
    undisturbed = replace(command, trial=replace(command.trial, kills=()))
    print(f"{arguments.config}, {command.trial.stop} iterations, seed {command.seed}")
    whole = run_through(undisturbed, folder / "undisturbed")
    print(f"  undisturbed  {whole.seconds:5.1f} s")
    killed = run_through(command, folder / "killed")
    kills = ", ".join(map(str, command.trial.kills))
    resumed = ", ".join(map(str, killed.resumed_at))
    print(f"  killed       {killed.seconds:5.1f} s  SIGKILL at iteration {kills}; resumed at iteration {resumed}\n")
    outcome = compare_runs(whole, killed, ignore=arguments.ignore)
    print("\n".join(group_table(outcome.groups)))
    if outcome.first is None:
        print("\nEXACT: the killed run left behind what the undisturbed one did, to the bit")
        return 0
    again = run_through(undisturbed, folder / "undisturbed_again")
    _explain(outcome, killed, reproducible=compare_runs(whole, again, ignore=arguments.ignore).first is None)
    return 1


def _explain(outcome: Any, killed: Any, *, reproducible: bool) -> None:
    from mmtrain.verify_resume.compare import likely_causes

    order = " (undisturbed != killed)" if " != " in outcome.first.how else ""
    print(f"\nDIFFERS, first in {outcome.first}{order}")
    if outcome.iteration is not None and outcome.iteration - 1 in killed.resumed_at:
        print(f"That is the first iteration after the resume at {outcome.iteration - 1}.")
    if reproducible:
        print("A second undisturbed run was the same to the bit, so it is the resume. Likely causes:")
    else:
        print("A second undisturbed run differed as well, so it is not the resume. Likely causes:")
    for cause in likely_causes(outcome, killed, killed.starts[-1], reproducible=reproducible):
        print(textwrap.fill(cause, _WIDTH, initial_indent="  - ", subsequent_indent="    "))


def _command(arguments: argparse.Namespace) -> Any:
    """What to run, worked out from the config. Raises ConfigError for numbers that make no trial."""
    from mmtrain.config import load_config, parse_overrides
    from mmtrain.randomness import draw_seed
    from mmtrain.verify_resume.runs import Command
    from mmtrain.verify_resume.trial import Trial

    cfg: Any = load_config(arguments.config, parse_overrides(arguments.cfg_options))
    if arguments.nproc_per_node < 0:
        raise ConfigError(f"--nproc-per-node is {arguments.nproc_per_node}; expected 1 or more")
    if cfg.get("launcher") not in (None, "none") and not arguments.nproc_per_node:
        raise ConfigError(f"launcher is {cfg['launcher']!r}; say how many processes with --nproc-per-node N")
    window = int((cfg.get("optim_wrapper") or {}).get("accumulative_counts", 1))
    steps = arguments.steps if arguments.steps is not None else max(20, 4 * window)
    steps = min(steps, (cfg.get("train_cfg") or {}).get("max_iters") or steps)
    kills = kill_points(steps, arguments.kills, at=arguments.at)
    interval = checkpoint_interval(steps, kills[0], window=window)
    seed = (cfg.get("randomness") or {}).get("seed")
    trial = Trial(stop=steps, interval=interval, kills=kills)
    return Command(
        arguments.config, trial, draw_seed() if seed is None else int(seed),
        cfg_options=tuple(arguments.cfg_options), processes=arguments.nproc_per_node,
    )  # fmt: skip


def kill_points(steps: int, kills: int, *, at: int | None = None) -> tuple[int, ...]:
    """The iterations of the kills: the first at ``at``, the others evenly spread between it and the end.

    Raises ConfigError where they do not fit into ``steps`` iterations.
    """
    if kills < 1:
        raise ConfigError(f"--kills is {kills}; expected 1 or more")
    first = at if at is not None else max(2, 2 * steps // (kills + 2))
    if not 2 <= first < steps:
        raise ConfigError(f"a kill at iteration {first} does not lie between 2 and the last of {steps} iterations")
    if kills > steps - first:
        raise ConfigError(f"{kills} kills from iteration {first} on do not fit into {steps} iterations; raise --steps")
    return tuple(first + index * (steps - first) // kills for index in range(kills))


def checkpoint_interval(steps: int, first_kill: int, *, window: int) -> int:
    """Iterations between checkpoints: whole windows, a quarter of the run, at least one checkpoint before the kill.

    Raises ConfigError where the first update ends too late for that.
    """
    interval = max(1, min(steps // 4, first_kill - 1) // window) * window
    if interval >= first_kill:
        raise ConfigError(
            f"a kill at iteration {first_kill} comes before the first checkpoint (an update is {window} iterations); "
            "choose a later one with --at, or raise --steps"
        )
    return interval
