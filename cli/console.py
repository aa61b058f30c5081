"""What the commands share on screen: results on stdout, progress on stderr."""

import json
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
    from samlite.report.table import Table as Values

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


def show_table(values: "Values") -> None:
    """Print a table of a report: what a row is about once for its neighbours, and its notes below."""
    view = _filled(values)
    if values.narrow and stdout.measure(view, options=stdout.options.update(width=1000)).maximum > stdout.width:
        view = _filled(values.narrow)
    stdout.print(values.title, style="bold")  # wider, perhaps, than the table
    stdout.print(view)
    for note in values.notes:
        stdout.print(note, style="dim")


def _filled(values: "Values") -> Table:
    view = table("", *values.columns)
    above: Sequence[str] | None = None
    for row in values.rows:
        keys, cells = row[: values.keys], row[values.keys :]
        if above is not None and keys != above:
            view.add_section()
        view.add_row(*(keys if keys != above else [""] * len(keys)), *cells)
        above = keys
    return view


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
    from samlite.tasks.metrics import percent  # which needs torch

    return f"{100 * value:.2f} %" if percent(name) == 100 else f"{value:.4g}"
