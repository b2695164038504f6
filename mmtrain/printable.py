"""Text of unknown origin, made safe to print: names in a checkpoint, a server's answer, a file's name."""

import re

# C0 and C1 controls but tab and line feed, DEL, the controls of writing direction, and halves of surrogate pairs,
# which no encoding can write. A terminal would obey them: move the cursor, retitle the window, hide what follows.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Return ``text`` with control characters and lone surrogates written as ``\x1b`` or ``\ud800``."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
