"""Formats sizes, times, counts and tables for the checkpoint commands."""

from collections.abc import Collection, Sequence
from datetime import datetime


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
    except ValueError:
        return created


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """``1 tensor``, ``1,024 tensors``."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def table(rows: Sequence[Sequence[str]], *, right: Collection[int] = (), indent: str = "") -> list[str]:
    """Format rows of equal length as aligned lines; columns in ``right`` are right-aligned."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append((indent + "  ".join(cells)).rstrip())
    return lines
