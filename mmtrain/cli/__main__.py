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
    fault = f"'{name}' is not a command" if name else "no command was given"
    sys.stderr.write(f"{text}\nerror: {fault}; expected one of {', '.join(COMMANDS)}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
