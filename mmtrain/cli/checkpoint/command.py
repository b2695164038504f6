"""``mmtrain checkpoint VERB``: look at checkpoints, prove them, compare them, take weights out, clear old ones away."""

import argparse
import importlib
from collections.abc import Sequence

from mmtrain.cli.errors import run_command

_PATHS = "A path is a checkpoint directory, or a work dir, which means the newest good checkpoint in it."


def make_parser() -> argparse.ArgumentParser:
    """The options of all verbs."""
    parser = argparse.ArgumentParser(
        prog="checkpoint.py",
        description="Look at checkpoints, prove them, compare them, take weights out, clear old ones away.",
        epilog=f"{_PATHS} Exit status: 0; 1 for a damaged checkpoint or a difference; 2 for a wrong command line.",
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show tracebacks of errors that are told in one sentence")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, text, add in _VERBS:
        add(verbs.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}. {_PATHS}", parents=[common]))
    return parser


def _list(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("work_dir", help="the directory that the checkpoints lie in")
    parser.add_argument("--full", action="store_true", help="compare every file's hash, not only its size")
    parser.set_defaults(function="list:list_checkpoints")


def _show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="a checkpoint or a work dir")
    parser.add_argument("--tensors", action="store_true", help="list every tensor with its type and shape")
    parser.add_argument("--config", action="store_true", help="print the run's config and nothing else")
    parser.set_defaults(function="show:show")


def _verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="a checkpoint, or a work dir: all checkpoints in it")
    parser.set_defaults(function="list:verify")


def _diff(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", help="a checkpoint or a work dir")
    parser.add_argument("b", help="the other one")
    parser.add_argument("--all", action="store_true", help="list every difference, not only the first twenty")
    parser.add_argument(
        "--ignore", nargs="+", default=[], metavar="PATTERN",
        help="names of state that need not agree (*, ? as in a shell); measured times and memory never need to",
    )  # fmt: skip
    parser.set_defaults(function="diff:diff")


def _audit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("work_dir", help="a work dir, or a checkpoint")
    parser.add_argument("checkpoint", nargs="?", help="one of its checkpoints; default: the newest good one")
    parser.set_defaults(function="audit:audit")


def _export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="a checkpoint or a work dir")
    parser.add_argument("out", help="the file to write, or the directory for huggingface")
    parser.add_argument(
        "--format", choices=["safetensors", "mmengine", "huggingface"],
        help="default: mmengine where OUT ends in .pth, else safetensors",
    )  # fmt: skip
    parser.add_argument(
        "--ema", nargs="?", const="", metavar="HOOK",
        help="the running averages in place of the weights; HOOK says whose where there are several",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="convert floating-point tensors")
    parser.add_argument(
        "--config", metavar="CONFIG",
        help="the config whose model this is: its weights are checked against it and frozen parameters that were not "
        "saved come from it. Needed for huggingface: a checkpoint's own config is text and is never run",
    )  # fmt: skip
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="change that config")
    parser.add_argument("--force", action="store_true", help="replace OUT where it exists")
    parser.set_defaults(function="export:export")


def _prune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("work_dir", help="the directory that the checkpoints lie in")
    parser.add_argument("--keep", type=int, required=True, metavar="N", help="how many of the newest stay (1 or more)")
    parser.add_argument("--keep-every", type=int, metavar="K", help="those at multiples of K iterations stay as well")
    parser.add_argument("--by-epoch", action="store_true", help="K counts epochs")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    parser.set_defaults(function="list:prune")


_VERBS = (
    ("list", "the checkpoints of a work dir", _list),
    ("show", "what a checkpoint holds", _show),
    ("verify", "compare every byte with its hash", _verify),
    ("diff", "name the first thing in which two checkpoints differ", _diff),
    ("audit", "prove from a run's ledger that no sample was lost or repeated, or name those", _audit),
    ("export", "write the weights for other programs", _export),
    ("prune", "delete old checkpoints, never the newest good one nor the best", _prune),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = make_parser().parse_args(argv)

    def command() -> int:
        module, _, function = arguments.function.partition(":")
        return getattr(importlib.import_module(f"mmtrain.cli.checkpoint.{module}"), function)(arguments)

    return run_command(command, debug=arguments.debug)
