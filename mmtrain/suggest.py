"""Near names for error messages: "did you mean 'x'?"."""

from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches


def nearest(name: str, names: Iterable[str], count: int = 1) -> list[str]:
    """Return up to ``count`` of ``names`` that look like ``name``, best first. Case is ignored."""
    by_lower: dict[str, str] = {}
    for known in names:
        by_lower.setdefault(known.lower(), known)
    return [by_lower[found] for found in get_close_matches(name.lower(), by_lower, count)]


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for the nearest of ``names``, or an empty string when none is near."""
    found = nearest(str(name), names)
    return f"; did you mean {found[0]!r}?" if found else ""


def letters_off(first: str, second: str) -> int:
    """Return how many letters of the longer name the other lacks in that order: 1 for one typing error."""
    blocks = SequenceMatcher(None, first, second, autojunk=False).get_matching_blocks()
    return max(len(first), len(second)) - sum(block.size for block in blocks)
