"""What the commands share on screen: results on stdout, progress on stderr."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console, JustifyMethod
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

if TYPE_CHECKING:
    from samlite.intervals import Interval

stdout = Console(markup=False, highlight=False)
stderr = Console(markup=False, highlight=False, stderr=True)


@contextmanager
def progress() -> Iterator[Progress]:
    """A progress bar that leaves nothing behind, and shows nothing where nobody watches."""
    columns = (SpinnerColumn(), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns,
        TextColumn("{task.description}", markup=False),
        console=stderr,
        transient=True,
        disable=not stderr.is_terminal or os.environ.get("RANK", "0") != "0",  # of several processes the first shows it
    ) as bar:
        yield bar


def table(title: str, *columns: str) -> Table:
    """An empty table in the house style; a column whose name starts with ">" is aligned right."""
    result = Table(title=title or None, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for name in columns:
        side: JustifyMethod = "right" if name.startswith(">") else "left"
        result.add_column(name.removeprefix(">"), justify=side, overflow="fold")
    return result


def facts(title: str) -> Table:
    """An empty table of names and values."""
    result = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False)
    result.add_column(style="cyan", no_wrap=True)
    result.add_column(overflow="fold")
    return result


def print_json(document: Any) -> None:
    """One JSON document on stdout, and nothing else."""
    click.echo(json.dumps(document, indent=2, allow_nan=False))


def metric(value: float, name: str) -> str:
    """A metric as people read it: a fraction in percent, a loss or a score as it is."""
    from samlite.report.by_width import percent  # which needs torch

    return f"{100 * value:.2f} %" if percent(name) == 100 else f"{value:.4g}"


def shortened(names: Sequence[str], most: int) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def interval(value: "Interval | None", scale: float = 1, sign: str = "") -> str:
    """Mean ± half width, to two digits of the latter."""
    if value is None:
        return "–"
    middle, half = scale * value.mean, value.half_width
    if half is None:
        return f"{middle:{sign}.4g}"
    half *= scale
    digits = max(0, 1 - math.floor(math.log10(half))) if half else 3
    if digits > 5:
        return f"{middle:{sign}.2g} ± {half:.2g}"
    return f"{middle:{sign}.{digits}f} ± {half:.{digits}f}"
