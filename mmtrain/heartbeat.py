"""Signs of life between iterations: whatever takes long calls `beat`, and the watchdog of `mmtrain.launch` looks at
`count`. It is a module of its own so that the checkpoint engine needs nothing of the launcher."""

_count = 0


def beat() -> None:
    """Report progress that is not an iteration: one validation batch, one block of a file."""
    global _count  # noqa: PLW0603 - one counter for the process
    _count += 1


def count() -> int:
    """How often `beat` was called in this process."""
    return _count
