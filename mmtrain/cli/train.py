"""``mmtrain train CONFIG``: train a model, or resume training."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from mmtrain.cli.errors import run_command
from mmtrain.cli.options import HelpFormatter, add_run_options, run_overrides
from mmtrain.config import load_config
from mmtrain.errors import ConfigError

_EPILOG = """\
examples:
  mmtrain train configs/gpt/tiny.py
  mmtrain train configs/gpt/tiny.py --resume auto
  torchrun --nproc-per-node 8 tools/train.py configs/gpt/tiny.py

exit status:
  0 training finished, 1 the run failed, 2 config or command-line error,
  75 stopped by a signal after saving (run the same command again), 130 Ctrl-C
"""


def make_parser() -> argparse.ArgumentParser:
    """The options of the train command. Options of MMEngine's and xtuner's tools/train.py have the same names here."""
    parser = argparse.ArgumentParser(
        prog="mmtrain train", description="Train a model from a Python config file.", epilog=_EPILOG,
        formatter_class=HelpFormatter,
    )  # fmt: skip
    parser.add_argument("config", help="config file")
    parser.add_argument(
        "--resume", nargs="?", const=True, metavar="auto|PATH",
        help="resume from the newest good checkpoint in the work dir; with 'auto', start from --load-from if there is "
        "none; with PATH, resume from that checkpoint",
    )  # fmt: skip
    parser.add_argument("--load-from", metavar="PATH", help="start a new run from these weights")
    parser.add_argument("--seed", type=int, help="set randomness.seed")
    parser.add_argument("--deterministic", action="store_true", help="set randomness.deterministic=True")
    parser.add_argument("--amp", action="store_true", help="use AmpOptimWrapper (mixed precision)")
    parser.add_argument("--auto-scale-lr", action="store_true", help="set auto_scale_lr.enable=True")
    parser.add_argument(
        "--deepspeed", metavar="PRESET|FILE",
        help="train with DeepSpeed ZeRO: zero1, zero2, zero3, zero2_offload, zero3_offload, or a DeepSpeed JSON config",
    )  # fmt: skip
    add_run_options(parser)
    return parser


def config_from(arguments: argparse.Namespace) -> Any:
    """Load the config with the overrides from the command line, which are checked like the file itself."""
    overrides = run_overrides(arguments)
    if arguments.seed is not None:
        overrides["randomness.seed"] = arguments.seed
    if arguments.deterministic:
        overrides["randomness.deterministic"] = True
    if arguments.amp:
        overrides["optim_wrapper.type"] = "AmpOptimWrapper"
    if arguments.auto_scale_lr:
        overrides["auto_scale_lr.enable"] = True
    overrides |= _starting_point(arguments.resume, arguments.load_from)
    if arguments.deepspeed is not None:
        from mmtrain.strategies.zero.options import overrides_for

        strategy = load_config(arguments.config, overrides).get("strategy")
        overrides |= overrides_for(arguments.deepspeed, strategy)
    return load_config(arguments.config, overrides)


def _starting_point(resume: str | bool | None, load_from: str | None) -> dict[str, Any]:
    """The overrides of ``--resume`` and ``--load-from``. Raises ConfigError if they contradict each other."""
    overrides: dict[str, Any] = {} if load_from is None else {"load_from": load_from}
    if resume is None:
        return overrides
    if resume in (True, "auto"):
        return {**overrides, "resume": resume}
    if load_from is not None:
        raise ConfigError(
            f"--resume {resume} and --load-from {load_from} contradict each other: the first resumes from a "
            "checkpoint, the second starts a new run from weights. Give only one of them, or use --resume auto "
            "--load-from PATH to start from these weights only when there is no checkpoint to resume from."
        )
    return {"resume": True, "load_from": resume}


def train(arguments: argparse.Namespace, change: Callable[[Any], None] | None = None) -> int:
    """Build the run, train, and return the exit status. ``change`` may edit the config first."""
    from mmtrain.registry import RUNNERS, resolve
    from mmtrain.runner.signals import starting

    with starting():
        cfg = config_from(arguments)
        if change is not None:
            change(cfg)
        runner_class = resolve(RUNNERS, cfg.get("runner_type") or "FlexibleRunner", path="runner_type")
        runner = runner_class.from_cfg(cfg)
    runner.train()
    return runner.exit_status


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = make_parser().parse_args(argv)
    return run_command(lambda: train(arguments), debug=arguments.debug, launcher=arguments.launcher)
