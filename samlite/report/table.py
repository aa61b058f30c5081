"""A table as a value: the terminal shows it, the documentation writes it as Markdown."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from samlite.intervals import Comparison, Interval

MISSING = "–"


@dataclass(frozen=True)
class Table:
    """Rows of text under a title, with notes below."""

    title: str
    columns: Sequence[str]
    """Their headings; one that starts with ">" is aligned right."""
    rows: Sequence[Sequence[str]]
    keys: int = 0
    """How many cells, from the first, say what a row is about; neighbours that agree in them form a group."""
    notes: Sequence[str] = ()
    narrow: "Table | None" = None
    """The same for a terminal that is too narrow for it."""

    def markdown(self) -> str:
        """As GitHub shows it; the title and the notes are lines of text around it."""
        lines = [
            [column.removeprefix(">") for column in self.columns],
            ["---:" if column.startswith(">") else "---" for column in self.columns],
            *([cell.replace("\n", " ") for cell in row] for row in self.rows),
        ]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join(part for part in (self.title and f"{self.title}:", table, " ".join(self.notes)) if part)


def interval(value: Interval | None, scale: float = 1, sign: str = "") -> str:
    """Mean ± half width, to two digits of the latter."""
    if value is None:
        return MISSING
    middle, half = scale * value.mean, value.half_width
    if half is None:
        return f"{middle:{sign}.4g}"
    half *= scale
    digits = max(0, 1 - math.floor(math.log10(half))) if half else 3
    if digits > 5:
        return f"{middle:{sign}.2g} ± {half:.2g}"
    return f"{middle:{sign}.{digits}f} ± {half:.{digits}f}"


def number(value: float | None) -> str:
    """Two digits."""
    return MISSING if value is None else f"{value:.2g}"


def digits(value: float) -> str:
    """Two digits, or all those of a number in the hundreds and thousands."""
    return f"{value:.0f}" if 99.5 <= value < 1e4 else f"{value:#.2g}".rstrip(".")


def comparison(value: Comparison | None, narrow: bool = False) -> str:
    """A ratio with its interval, under it if that is narrower, and then the verdict."""
    if value is None:
        return MISSING
    ratio = value.ratio
    if ratio.mean is None:
        return f"no ratio:\n0 in {ratio.zeros} of {ratio.n} pairs"
    if ratio.low is None or ratio.high is None:
        return digits(ratio.mean)
    gap = "\n" if narrow else " "
    middle, low, high = map(digits, (ratio.mean, ratio.low, ratio.high))
    verdict = str(value.verdict).replace("significant ", "significant\n")
    return f"{middle}{gap}({low} to {high})\n{verdict}"
