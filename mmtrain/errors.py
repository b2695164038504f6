"""The errors that end a run with one clear sentence and a fixed exit status.

Everything that a user can fix raises one of these. The command line prints the message without a traceback (unless
``--debug``) and exits with the status of the class. Any other exception is a bug, or comes from the user's code.
"""

from mmtrain.printable import printable


class MMTrainError(Exception):
    """Base class of errors that are reported in a sentence or two: where, what was found or expected, what to do.

    Control characters in the message are escaped: it may quote names from files of unknown origin.
    """

    exit_status = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(str(message)))


class ConfigError(MMTrainError):
    """The config, the command line or the setup is wrong; nothing was run. Exit status 2."""

    exit_status = 2


class RunError(MMTrainError):
    """The run failed after it started. Exit status 1."""


class CheckpointError(RunError):
    """A checkpoint is missing, damaged or does not belong to this run. Exit status 1."""
