"""How a command ends: one sentence and a fixed exit status, a traceback only where it helps."""

import sys
import traceback
from collections.abc import Callable

from mmtrain import launch
from mmtrain.errors import MMTrainError


def run_command(command: Callable[[], int | None], *, debug: bool) -> int:
    """Run a command and return its exit status.

    An `MMTrainError` is printed as one sentence with its own status (2 for a wrong config, 1 for a failed run); with
    ``debug`` its traceback comes first. Ctrl-C gives 130. Any other exception is the user's code or a bug: its
    traceback is printed, with status 1. Of several processes rank 0 alone speaks; those end here and do not return.
    """
    status = _run(command, debug=debug)
    launch.end_process(status)
    return status


def _run(command: Callable[[], int | None], *, debug: bool) -> int:
    try:
        status = command() or 0
        launch.leave()
        return status
    except MMTrainError as error:
        if debug and launch.speaks():
            traceback.print_exc()
        return _ended(f"{error}", error.exit_status, quiet=not launch.speaks())
    except KeyboardInterrupt:
        if launch.speaks():
            sys.stderr.write("\ninterrupted\n")
        return 130
    except Exception as error:
        sentence = f"the run failed with {type(error).__name__}: {error}"
        return _ended(sentence, 1, quiet=False, shown=traceback.format_exc())


def _ended(sentence: str, status: int, *, quiet: bool, shown: str = "") -> int:
    """Tell why the command ended: together with the other ranks, or alone."""
    reported = launch.report(sentence, status, traceback.format_exc())
    if reported is not None:
        return reported
    if not quiet:
        sys.stderr.write(f"{shown}\nerror: {sentence}\n")
    return status
