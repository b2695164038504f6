"""``mmtrain test CONFIG CHECKPOINT``: evaluate a checkpoint."""

import argparse
import json
from collections.abc import Sequence

from mmtrain import launch
from mmtrain.cli.errors import run_command
from mmtrain.cli.options import HelpFormatter, add_run_options, run_overrides
from mmtrain.config import load_config

_EPILOG = """\
example:
  mmtrain test configs/gpt/tiny.py work_dirs/gpt_tiny/iter_40.pth

Prints the metrics as one JSON object.
"""


def make_parser() -> argparse.ArgumentParser:
    """The options of the test command."""
    parser = argparse.ArgumentParser(
        prog="mmtrain test", description="Evaluate a checkpoint on the test sets of a config.", epilog=_EPILOG,
        formatter_class=HelpFormatter,
    )  # fmt: skip
    parser.add_argument("config", help="config file")
    parser.add_argument("checkpoint", nargs="?", help="weights to evaluate (default: load_from in the config)")
    parser.add_argument("--val", action="store_true", help="use the validation sets instead of the test sets")
    add_run_options(parser)
    return parser


def evaluate(arguments: argparse.Namespace) -> None:
    """Evaluate, and print the metrics on rank 0."""
    from mmtrain.runner import FlexibleRunner

    overrides = {**run_overrides(arguments), "resume": False}
    if arguments.checkpoint is not None:
        overrides["load_from"] = arguments.checkpoint
    task = "val" if arguments.val else "test"
    runner = FlexibleRunner.from_cfg(load_config(arguments.config, overrides), task=task)
    metrics = runner.val() if arguments.val else runner.test()
    if launch.is_reporting_rank():
        print(json.dumps(metrics))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = make_parser().parse_args(argv)
    return run_command(lambda: evaluate(arguments), debug=arguments.debug, launcher=arguments.launcher)
