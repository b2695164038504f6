"""The errors that end a run with one clear sentence and a fixed exit status.

Everything a user can fix raises one of these; the command line prints the sentence without a traceback
(unless ``--debug``) and exits with the class's status. Any other exception is a bug or the user's own code.
"""


class MMTrainError(Exception):
    """Base of the errors that are reported in one sentence: where, what was found, what was expected, what to do."""

    exit_status = 1


class ConfigError(MMTrainError):
    """The config, the command line or the set-up is wrong; nothing was run. Exit status 2."""

    exit_status = 2


class RunError(MMTrainError):
    """The run failed after it had started. Exit status 1."""


class CheckpointError(RunError):
    """A checkpoint is missing, damaged or does not belong to this run. Exit status 1."""
