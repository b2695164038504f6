"""Text of unknown origin, made safe to print: names in a checkpoint, a server's answer, a file's name."""

import re
from collections.abc import Sequence

# C0 and C1 controls but tab and line feed, DEL, the controls of writing direction, and halves of surrogate pairs,
# which no encoding can write. A terminal would obey them: move the cursor, retitle the window, hide what follows.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Return ``text`` with control characters and lone surrogates written as ``\x1b`` or ``\ud800``."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first ``most`` names, and how many more there are: ``a, b and 3 more``."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def reason(error: BaseException, limit: int = 300) -> str:
    """Why, in one short line: the first line of an exception's message, with its type where the message is a mere key.

    A library's message may quote a whole damaged file.
    """
    text = str(error).strip()
    line = text.splitlines()[0] if text else ""
    if not line or isinstance(error, LookupError):
        line = f"{type(error).__name__}: {line}" if line else type(error).__name__
    return printable(line if len(line) <= limit else f"{line[: limit - 3]}...")
