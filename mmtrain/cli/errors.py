"""How a command ends: one sentence and a fixed exit status, a traceback only where it helps."""

import os
import select
import sys
import traceback
from collections.abc import Callable

from mmtrain import launch
from mmtrain.errors import MMTrainError

READER_LEFT = 128 + 13  # as a shell tells of SIGPIPE


def run_command(command: Callable[[], int | None], *, debug: bool, launcher: str | None = None) -> int:
    """Run a command and return its exit status.

    An `MMTrainError` is printed as one sentence with its own status (2 for a wrong config, 1 for a failed run); with
    ``debug`` its traceback comes first. Ctrl-C gives 130. Any other exception is the user's code or a bug: its
    traceback is printed, with status 1. Of several processes, which ``launcher`` started, rank 0 alone speaks; those
    end here and do not return. Where the reader of the output has left, as ``| head`` does, the command ends quietly
    with the status of a program that its reader left (141).
    """
    status = _run(command, debug=debug, launcher=launcher or "none")
    if not _all_written():
        status = READER_LEFT
    launch.end_process(status)
    return status


def _run(command: Callable[[], int | None], *, debug: bool, launcher: str) -> int:
    try:
        status = command() or 0
        launch.leave()
        return status
    except MMTrainError as error:
        if debug and launch.is_reporting_rank():
            traceback.print_exc()
        return _ended(f"{error}", error.exit_status, launcher)
    except KeyboardInterrupt:
        if launch.is_reporting_rank():
            sys.stderr.write("\ninterrupted\n")
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return READER_LEFT
        if launch.lost_connection(error):
            told = str(error).splitlines()[0]
            return _ended(f"another process is gone, it was probably killed ({told})", 1, launcher)
        sentence = f"the run failed with {type(error).__name__}: {error}"
        return _ended(sentence, 1, launcher, shown=traceback.format_exc())


def _nobody_reads() -> bool:
    """Whether standard output is a pipe without a reader: other pipes of the command may break too."""
    if sys.stdout is None or not hasattr(select, "poll"):
        return False
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _all_written() -> bool:
    """Flush standard output; False, and the rest is dropped, where it is a pipe that nobody reads any more."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter will flush once more
        return False
    except OSError:  # a full disk: the interpreter tells of it when it flushes
        return True
    return True


def _ended(sentence: str, status: int, launcher: str, *, shown: str = "") -> int:
    """Tell why the command ended: together with the other ranks, or alone."""
    trace = traceback.format_exc()
    reported = launch.report(sentence, status, trace)
    if reported is None:
        own = launch.Failure(0, sentence, status, trace)
        launch.report_before_joining(launcher, own, lambda who: sys.stderr.write(f"{shown}\nerror: {who}{sentence}\n"))
    return status if reported is None else reported
