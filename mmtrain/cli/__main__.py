"""``mmtrain COMMAND ...`` and ``python -m mmtrain COMMAND ...``: each command is a module of this package."""

import importlib
import sys

COMMANDS = {
    "train": "train a model, or resume training",
    "test": "evaluate a checkpoint",
    "checkpoint": "list, show, verify, diff, audit, export or prune checkpoints",
    "verify-resume": "check that a killed run of a config resumes bit-for-bit",
}
_HELP = """\
usage: mmtrain COMMAND ...

commands:
{commands}

examples:
  mmtrain train configs/gpt/tiny.py --resume auto
  mmtrain test configs/gpt/tiny.py work_dirs/gpt_tiny/iter_40.pth
  mmtrain checkpoint list work_dirs/gpt_tiny
  mmtrain verify-resume configs/gpt/tiny.py

Run "mmtrain COMMAND --help" for the options of a command.
"""


def main() -> int:
    """Run the command that the first argument names. Only that command's module is imported."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in COMMANDS:
        module = importlib.import_module(f"mmtrain.cli.{name.replace('-', '_')}")
        return module.main(sys.argv[2:])
    text = _HELP.format(commands="\n".join(f"  {command:<16}{what}" for command, what in COMMANDS.items()))
    if name in ("-h", "--help"):
        sys.stdout.write(text)
        return 0
    if not name:
        sys.stderr.write(text)
        return 2
    usage = text.splitlines()[0]
    sys.stderr.write(f"{usage}\nerror: {name!r} is not a command; expected one of {', '.join(COMMANDS)}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
