"""One start of a run under ``verify-resume``: the train command with a hook that stops or kills it.

``python -m mmtrain.cli.trial TRIAL TRAIN_OPTIONS...``, where ``TRIAL`` is a `Trial` as JSON.
"""

import sys
from collections.abc import Sequence

from mmtrain.cli.errors import run_command
from mmtrain.cli.train import make_parser, train
from mmtrain.verify_resume.trial import Trial, change_config


def main(argv: Sequence[str] | None = None) -> int:
    """Run one start and return its exit status."""
    text, *options = sys.argv[1:] if argv is None else argv
    arguments = make_parser().parse_args(options)
    trial = Trial.from_json(text)
    return run_command(
        lambda: train(arguments, change=lambda cfg: change_config(cfg, trial)),
        debug=arguments.debug,
        launcher=arguments.launcher,
    )


if __name__ == "__main__":
    sys.exit(main())
