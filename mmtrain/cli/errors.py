"""How a command ends: one sentence and a fixed exit status, a traceback only where it helps."""

import os
import select
import sys
import traceback
from collections.abc import Callable

from mmtrain import launch
from mmtrain.errors import MMTrainError

OUTPUT_CLOSED = 128 + 13  # the status that a shell reports for SIGPIPE


def run_command(command: Callable[[], int | None], *, debug: bool, launcher: str | None = None) -> int:
    """Run a command and return its exit status.

    An `MMTrainError` is printed as one line and ends with its exit status (2 for a config error, 1 for a failed run);
    with ``debug`` its traceback is printed first. Ctrl-C gives 130. Any other exception comes from the user's code or a
    bug: its traceback is printed, and the status is 1. In a run of several processes, which ``launcher`` started, only
    rank 0 prints, and the process exits here instead of returning. If the reader of standard output has closed it, as
    in ``| head``, the command ends silently with status 141, like a program that SIGPIPE ends.
    """
    status = _run(command, debug=debug, launcher=launcher or "none")
    if not _all_written():
        status = OUTPUT_CLOSED
    launch.end_process(status)
    return status


def _run(command: Callable[[], int | None], *, debug: bool, launcher: str) -> int:
    launch.share_failures()
    try:
        status = command() or 0
        launch.leave()
        return status
    except MMTrainError as error:
        if debug and launch.is_reporting_rank():
            traceback.print_exc()
        return _report(error, launcher)
    except KeyboardInterrupt as error:
        reported = launch.report(launch.describe(error))
        if reported is None and launch.is_reporting_rank():
            sys.stderr.write("\ninterrupted\n")
        return reported or launch.INTERRUPTED
    except SystemExit as error:
        reported = launch.report(launch.describe(error))
        if reported is None:  # a single process ends as Python ends it
            raise
        return reported
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _output_closed():
            return OUTPUT_CLOSED
        return _report(error, launcher)


def _output_closed() -> bool:
    """Whether standard output is a pipe without a reader: the broken pipe may also be another one."""
    if sys.stdout is None or not hasattr(select, "poll"):
        return False
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _all_written() -> bool:
    """Flush standard output. If it is a pipe without a reader, drop the rest and return False."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter will flush once more
        return False
    except OSError:  # a full disk: the interpreter reports it when it flushes
        return True
    return True


def _report(error: Exception, launcher: str) -> int:
    """Print why the command failed, once for all ranks, and return the exit status."""
    failure = launch.describe(error)
    status = launch.report(failure)
    if status is None:
        shown = failure.trace if failure.is_unforeseen else ""
        launch.report_before_joining(
            launcher, failure, lambda who: sys.stderr.write(f"{shown}\nerror: {who}{failure.sentence}\n")
        )
    return failure.status if status is None else status
