"""``mmtrain test CONFIG CHECKPOINT``: evaluate a checkpoint on the config's test sets."""

import argparse
import json
from collections.abc import Sequence

from mmtrain import launch
from mmtrain.cli.errors import run_command
from mmtrain.config import load_config, parse_overrides


def make_parser() -> argparse.ArgumentParser:
    """The options of the test command."""
    parser = argparse.ArgumentParser(prog="test.py", description="Evaluate a checkpoint on the config's test sets.")
    parser.add_argument("config", help="the config file")
    parser.add_argument("checkpoint", nargs="?", help="weights to evaluate (default: the config's load_from)")
    parser.add_argument("--val", action="store_true", help="use the validation sets instead of the test sets")
    parser.add_argument("--work-dir", help="where logs go (default: work_dirs/<name of the config>)")
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="change the config")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors that are told in one sentence")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, print the metrics as one JSON object, and return the exit status."""
    arguments = make_parser().parse_args(argv)

    def command() -> None:
        from mmtrain.runner import FlexibleRunner

        overrides = parse_overrides(arguments.cfg_options)
        overrides["resume"] = False
        if arguments.work_dir is not None:
            overrides["work_dir"] = arguments.work_dir
        if arguments.checkpoint is not None:
            overrides["load_from"] = arguments.checkpoint
        kind = "val" if arguments.val else "test"
        runner = FlexibleRunner.from_cfg(load_config(arguments.config, overrides), task=kind)
        metrics = runner.val() if arguments.val else runner.test()
        if launch.is_reporting_rank():
            print(json.dumps(metrics))

    return run_command(command, debug=arguments.debug)
