"""What reading a hostile file may cost: a hang ends in an error, and memory must not grow with what a file claims."""

import resource
import signal
from contextlib import contextmanager


@contextmanager
def limited(seconds=0):
    """End what is inside after ``seconds``; with 0, `signal.alarm` sets the time later. Checks the memory at the end."""

    def late(*_):
        raise KeyboardInterrupt("it hangs")  # no AssertionError: readers turn any Exception into their own

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    old = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 600_000, f"{grown} kB"
