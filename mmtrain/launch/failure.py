"""What ended a rank, as the sentence that is printed and the exit status."""

import re
import traceback
from dataclasses import dataclass

from mmtrain.errors import MMTrainError

INTERRUPTED = 130  # as a shell reports SIGINT
_GONE = re.compile(r"gloo.*(Connection (closed|reset) by peer|Broken pipe)|ncclRemoteError", re.DOTALL)


@dataclass(frozen=True, slots=True)
class RankFailure:
    """What ended a rank: the sentence to print, and the exit status that all ranks then have.

    ``is_lost``: this rank only noticed that another one is gone. ``is_unforeseen``: its traceback is worth printing.
    """

    rank: int
    sentence: str
    status: int
    trace: str = ""
    is_lost: bool = False
    is_unforeseen: bool = False


def describe(error: BaseException, rank: int = 0) -> RankFailure:
    """The failure that an exception is."""
    trace = "".join(traceback.format_exception(error))
    if isinstance(error, MMTrainError):
        return RankFailure(rank, f"{error}", error.exit_status, trace)
    if isinstance(error, KeyboardInterrupt):
        return RankFailure(rank, "interrupted by Ctrl-C (KeyboardInterrupt)", INTERRUPTED, trace)
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        what = "" if error.code is None else repr(error.code)
        return RankFailure(rank, f"sys.exit({what}) was called before the end of the run", code, trace)
    if is_lost_connection(error):
        cause = str(error).splitlines()[0]
        return RankFailure(rank, f"lost the connection to another process ({cause})", 1, trace, is_lost=True)
    sentence = f"the run failed with {type(error).__name__}: {error}"
    return RankFailure(rank, sentence, 1, trace, is_unforeseen=True)


def is_lost_connection(error: BaseException) -> bool:
    """Whether torch's exchange failed because another process is gone; gloo and NCCL say so in the message only."""
    return isinstance(error, RuntimeError) and _GONE.search(str(error)) is not None
