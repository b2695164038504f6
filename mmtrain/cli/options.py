"""Options that several commands share."""

import argparse
from typing import Any

from mmtrain.config import parse_overrides
from mmtrain.launchers import LAUNCHERS

# Keeps the line breaks of descriptions and epilogs, which hold examples.
HelpFormatter = argparse.RawDescriptionHelpFormatter


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options of commands that build a run from a config; added last, so that ``--help`` lists them last."""
    parser.add_argument("--work-dir", metavar="DIR", help="output directory (default: work_dirs/<config name>)")
    parser.add_argument("--launcher", choices=LAUNCHERS, help="how the processes were started")
    parser.add_argument("--local-rank", "--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    add_cfg_options(parser)
    add_debug(parser)


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """``--cfg-options KEY=VALUE ...``."""
    parser.add_argument(
        "--cfg-options", nargs="+", default=[], metavar="KEY=VALUE",
        help="override config values, e.g. train_cfg.max_iters=100",
    )  # fmt: skip


def add_debug(parser: argparse.ArgumentParser) -> None:
    """``--debug``."""
    parser.add_argument("--debug", action="store_true", help="show full tracebacks for reported errors")


def run_overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    """The config values that the options of `add_run_options` set."""
    overrides: dict[str, Any] = parse_overrides(arguments.cfg_options)
    if arguments.work_dir is not None:
        overrides["work_dir"] = arguments.work_dir
    if arguments.launcher is not None:
        overrides["launcher"] = arguments.launcher
    return overrides
