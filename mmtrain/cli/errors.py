"""How a command ends: one sentence and a fixed exit status, a traceback only where it helps."""

import sys
import traceback
from collections.abc import Callable

from mmtrain import launch
from mmtrain.errors import MMTrainError


def run_command(command: Callable[[], int | None], *, debug: bool, launcher: str | None = None) -> int:
    """Run a command and return its exit status.

    An `MMTrainError` is printed as one sentence with its own status (2 for a wrong config, 1 for a failed run); with
    ``debug`` its traceback comes first. Ctrl-C gives 130. Any other exception is the user's code or a bug: its
    traceback is printed, with status 1. Of several processes, which ``launcher`` started, rank 0 alone speaks; those
    end here and do not return.
    """
    status = _run(command, debug=debug, launcher=launcher or "none")
    launch.end_process(status)
    return status


def _run(command: Callable[[], int | None], *, debug: bool, launcher: str) -> int:
    try:
        status = command() or 0
        launch.leave()
        return status
    except MMTrainError as error:
        if debug and launch.speaks():
            traceback.print_exc()
        return _ended(f"{error}", error.exit_status, launcher)
    except KeyboardInterrupt:
        if launch.speaks():
            sys.stderr.write("\ninterrupted\n")
        return 130
    except Exception as error:
        sentence = f"the run failed with {type(error).__name__}: {error}"
        return _ended(sentence, 1, launcher, shown=traceback.format_exc())


def _ended(sentence: str, status: int, launcher: str, *, shown: str = "") -> int:
    """Tell why the command ended: together with the other ranks, or alone."""
    trace = traceback.format_exc()
    reported = launch.report(sentence, status, trace)
    if reported is None:
        own = launch.Failure(0, sentence, status, trace)
        launch.report_before_joining(launcher, own, lambda who: sys.stderr.write(f"{shown}\nerror: {who}{sentence}\n"))
    return status if reported is None else reported
