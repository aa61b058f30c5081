"""What the commands share on screen: results on stdout, progress on stderr."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

stdout = Console()
stderr = Console(stderr=True)


@contextmanager
def progress() -> Iterator[Progress]:
    """A progress bar that leaves nothing behind, and shows nothing where nobody watches."""
    columns = (SpinnerColumn(), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns,
        TextColumn("{task.description}", markup=False),
        console=stderr,
        transient=True,
        disable=not stderr.is_terminal,
    ) as bar:
        yield bar


def table(title: str, *columns: str) -> Table:
    """An empty table in the house style; a column whose name starts with ">" is aligned right."""
    result = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in columns:
        result.add_column(
            name.removeprefix(">"), justify="right" if name.startswith(">") else "left", overflow="fold"
        )
    return result


def print_json(document: Any) -> None:
    """One JSON document on stdout, and nothing else."""
    click.echo(json.dumps(document, indent=2, allow_nan=False))


def metric(value: float, name: str) -> str:
    """A metric as people read it: an accuracy in percent, a loss as it is."""
    return f"{100 * value:.2f} %" if name == "accuracy" else f"{value:.4g}"
