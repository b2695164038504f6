"""Formats sizes, times, counts and tables for the checkpoint commands, and prints."""

import sys
from collections.abc import Collection, Sequence
from datetime import datetime

from mmtrain.printable import printable


def echo(text: str, *, end: str = "\n") -> None:
    """Print on standard output; control characters, which names in a checkpoint may have, are escaped."""
    print(printable(text), end=end)


def warn(text: str) -> None:
    """Print a line on standard error, escaped as by `echo`."""
    sys.stderr.write(f"{printable(text)}\n")


def size(count: int) -> str:
    """Format a number of bytes in decimal units: ``812 B``, ``10.3 KB``, ``1.2 GB``."""
    value, unit = float(count), "B"
    for larger in ("KB", "MB", "GB", "TB"):
        if value < 999.95:
            break
        value, unit = value / 1000, larger
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


def when(created: str) -> str:
    """Format a manifest's time, an ISO string in UTC, as local time to the minute."""
    try:
        return datetime.fromisoformat(created).astimezone().strftime("%Y-%m-%d %H:%M")
    except (ValueError, OverflowError):  # another text, or a year that no calendar has here
        return created


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """``1 tensor``, ``1,024 tensors``."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def table(rows: Sequence[Sequence[str]], *, right: Collection[int] = (), indent: str = "") -> list[str]:
    """Format rows of equal length as aligned lines; columns in ``right`` are right-aligned. Cells are escaped."""
    rows = [[printable(cell).replace("\n", "\\n") for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append((indent + "  ".join(cells)).rstrip())
    return lines
