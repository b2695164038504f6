"""Progress between iterations: code that takes long calls `beat`, and the watchdog of `mmtrain.launch` reads `count`.

It is a separate module so that the checkpoint engine does not import the launcher.
"""

_count = 0


def beat() -> None:
    """Report progress that is not an iteration: one validation batch, one block of a file."""
    global _count  # noqa: PLW0603 - one counter for the process
    _count += 1


def count() -> int:
    """How often `beat` was called in this process."""
    return _count
