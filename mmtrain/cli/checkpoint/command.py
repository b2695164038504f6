"""The command line of ``mmtrain checkpoint COMMAND``."""

import argparse
import importlib
from collections.abc import Sequence

from mmtrain.cli.errors import run_command
from mmtrain.cli.options import HelpFormatter, add_cfg_options, add_debug

_EXIT_STATUS = "Exit status: 0 success, 1 damaged or different, 2 command-line error."
_EPILOG = f"""\
examples:
  mmtrain checkpoint list work_dirs/gpt_tiny
  mmtrain checkpoint show work_dirs/gpt_tiny/iter_40.pth
  mmtrain checkpoint diff work_dirs/a work_dirs/b
  mmtrain checkpoint export work_dirs/gpt_tiny weights.safetensors
  mmtrain checkpoint prune work_dirs/gpt_tiny --keep 3 --dry-run

A path is a checkpoint directory, or a work dir for the newest good checkpoint
in it.

{_EXIT_STATUS}
"""


def make_parser() -> argparse.ArgumentParser:
    """The options of all commands."""
    parser = argparse.ArgumentParser(
        prog="mmtrain checkpoint",
        description="Inspect, verify, compare, export and delete checkpoints.",
        epilog=_EPILOG,
        formatter_class=HelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for name, text, add_arguments in _COMMANDS:
        added = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=_EXIT_STATUS)
        add_arguments(added)
        add_debug(added)
    return parser


def _list(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("work_dir", help="directory containing the checkpoints")
    parser.add_argument("--full", action="store_true", help="check every file's hash, not only its size")
    parser.set_defaults(function="listing:list_checkpoints")


def _show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="a checkpoint, or a work dir for the newest good one")
    parser.add_argument("--tensors", action="store_true", help="list every tensor with its dtype and shape")
    parser.add_argument("--config", action="store_true", help="print only the run's config")
    parser.set_defaults(function="show:show")


def _verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="a checkpoint, or a work dir for all checkpoints in it")
    parser.set_defaults(function="verify:verify")


def _diff(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", help="a checkpoint, or a work dir for the newest good one")
    parser.add_argument("b", help="the checkpoint to compare it with")
    parser.add_argument("--all", action="store_true", help="list every difference, not only the first twenty")
    parser.add_argument(
        "--ignore", nargs="+", default=[], metavar="PATTERN",
        help="names of state to leave out of the comparison (* and ? as in a shell); measured times and memory are "
        "never compared",
    )  # fmt: skip
    parser.set_defaults(function="diff:diff")


def _audit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("work_dir", help="a work dir, or a checkpoint")
    parser.add_argument("checkpoint", nargs="?", help="name of a checkpoint in the work dir (default: newest good one)")
    parser.set_defaults(function="audit:audit")


def _export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="a checkpoint, or a work dir for the newest good one")
    parser.add_argument("out", help="file to write, or directory for huggingface")
    parser.add_argument(
        "--format", choices=["safetensors", "mmengine", "huggingface"],
        help="default: mmengine if OUT ends in .pth, else safetensors",
    )  # fmt: skip
    parser.add_argument(
        "--ema", nargs="?", const="", metavar="HOOK",
        help="export a hook's weight averages instead of the weights; name the HOOK if there are several",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="convert floating-point tensors")
    parser.add_argument(
        "--config", metavar="CONFIG",
        help="config of the model: checks the weights against it, and supplies frozen parameters that were not saved. "
        "Required for huggingface, because the config stored in a checkpoint is never executed",
    )  # fmt: skip
    add_cfg_options(parser)
    parser.add_argument("--force", action="store_true", help="overwrite OUT if it exists")
    parser.set_defaults(function="export:export")


def _prune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("work_dir", help="directory containing the checkpoints")
    parser.add_argument("--keep", type=int, required=True, metavar="N", help="keep the newest N checkpoints")
    parser.add_argument("--keep-every", type=int, metavar="K", help="also keep those at multiples of K iterations")
    parser.add_argument("--by-epoch", action="store_true", help="K counts epochs")
    parser.add_argument("--dry-run", action="store_true", help="only print what would be deleted")
    parser.set_defaults(function="prune:prune")


_COMMANDS = (
    ("list", "list the checkpoints of a work dir", _list),
    ("show", "show what a checkpoint contains", _show),
    ("verify", "check every file of a checkpoint against its hash", _verify),
    ("diff", "compare two checkpoints and name the first difference", _diff),
    ("audit", "check from a run's ledger that no sample was lost or repeated", _audit),
    ("export", "write the weights for other programs", _export),
    ("prune", "delete old checkpoints, but never the newest good one or the best", _prune),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = make_parser().parse_args(argv)

    def command() -> int:
        module, _, function = arguments.function.partition(":")
        return getattr(importlib.import_module(f"mmtrain.cli.checkpoint.{module}"), function)(arguments)

    return run_command(command, debug=arguments.debug)
