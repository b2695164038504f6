"""Leaving a wait for data when a signal asks the run to end.

The train loop says whether it stands at a save point (`at_save_point`), the data pool says when it waits for a batch
(`waiting`), and the signal handler calls `interrupt`. If both are true, `Interrupted` is raised out of the wait, which
changes nothing that is saved. Otherwise the signal is answered at the end of the step.
"""


class Interrupted(BaseException):
    """A signal arrived while a batch was awaited at a save point.

    Not an Exception, so that handlers of errors in a dataset let it pass.
    """


class Wait:
    """The state of the main thread: plain attributes, because they change in every iteration."""

    def __init__(self) -> None:
        self.at_save_point = False
        self.waiting = False
        self.requested = False  # a signal has arrived

    def interrupt(self) -> None:
        """Called by the signal handler; raises `Interrupted` if the wait for a batch can be left now."""
        self.requested = True
        self.check()

    def check(self) -> None:
        """Raise `Interrupted` if a signal has arrived; called again when a wait begins."""
        if self.requested and self.waiting and self.at_save_point:
            raise Interrupted


wait = Wait()
