"""``mmtrain VERB ...`` and ``python -m mmtrain VERB ...``: each verb is a module of this package."""

import importlib
import sys

VERBS = {
    "train": "train a config, or resume it",
    "test": "evaluate a checkpoint",
    "checkpoint": "list, show, verify, diff, export or prune checkpoints",
    "verify-resume": "prove on a config that a killed run resumes to the bit",
}


def main() -> int:
    """Run the verb that the first argument names; each verb's module is imported only when it is asked for."""
    if len(sys.argv) < 2 or sys.argv[1] not in VERBS:
        lines = [f"  {verb:<16}{text}" for verb, text in VERBS.items()]
        stream = sys.stdout if sys.argv[1:2] in (["-h"], ["--help"]) else sys.stderr
        stream.write("usage: mmtrain VERB ...\n\n" + "\n".join(lines) + "\n")
        return 0 if stream is sys.stdout else 2
    module = importlib.import_module(f"mmtrain.cli.{sys.argv[1].replace('-', '_')}")
    return module.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
