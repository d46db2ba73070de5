"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column is text, the others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(values: Sequence[float], digits: int = 1, unit: float = 1.0) -> str:
    """`median (minimum, maximum)` in units."""
    scaled = [value / unit for value in values]
    return f"{median(scaled):.{digits}f} ({min(scaled):.{digits}f}, {max(scaled):.{digits}f})"


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> str:
    """How many times as long theirs took, round by round."""
    return spread([a / b for a, b in zip(theirs, ours, strict=True)], 2)
