"""How a command ends: one sentence and a fixed exit status, a traceback only where it helps."""

import sys
import traceback
from collections.abc import Callable

from mmtrain.errors import MMTrainError


def run_command(command: Callable[[], int | None], *, debug: bool) -> int:
    """Run a command and return its exit status.

    An `MMTrainError` is printed as one sentence with its own status (2 for a wrong config, 1 for a failed run); with
    ``debug`` its traceback comes first. Ctrl-C gives 130. Any other exception is the user's code or a bug: its
    traceback is printed, with status 1.
    """
    try:
        return command() or 0
    except MMTrainError as error:
        if debug:
            traceback.print_exc()
        sys.stderr.write(f"\nerror: {error}\n")
        return error.exit_status
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        return 130
    except Exception as error:
        traceback.print_exc()
        sys.stderr.write(f"\nerror: the run failed with {type(error).__name__}: {error}\n")
        return 1
