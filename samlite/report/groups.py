"""The runs of a sweep that differ by their seed alone."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from samlite.errors import UsageError
from samlite.report.table import Table
from samlite.sweep.grid import read_cells
from samlite.sweep.run import finished
from samlite.training.config import Config
from samlite.training.options import CONDITIONS, FAMILY

Result = TypeVar("Result")  # of a group


@dataclass(frozen=True)
class Group:
    """What the runs of a group have in common."""

    condition: tuple[tuple[str, float], ...]  # of `CONDITIONS`, those that the sweep varies
    width: int
    optimizer: str
    rho: float | None  # of SAM

    @property
    def label(self) -> str:
        """Such as: sam ρ=0.1, label noise 0.25."""
        return ", ".join(part for part in (self.method, described(self.condition)) if part)

    @property
    def method(self) -> str:
        """Such as: sam ρ=0.1."""
        return method(self.optimizer, self.rho)


def method(optimizer: str, rho: float | None) -> str:
    """An optimizer with its radius, if it has one."""
    return optimizer if rho is None else f"{optimizer} ρ={rho:g}"


def groups(folder: Path) -> dict[Group, list[Config]]:
    """The finished runs of a sweep, grouped, by condition and growing width. Raises UsageError where there are none."""
    cells = read_cells(folder)
    done = [cell for cell in cells if finished(folder / cell.name, cell)]
    if not done:
        raise UsageError(f"{folder} must hold a finished run; repeat its sweep")
    varied = varying(cells)
    cells_of: dict[Group, list[Config]] = {}
    for cell in done:
        rho = cell.rho if cell.optimizer in FAMILY else None
        cells_of.setdefault(Group(condition_of(cell, varied), cell.width, cell.label, rho), []).append(cell)
    return {group: cells_of[group] for group in sorted(cells_of, key=lambda group: (group.condition, group.width))}


def document(results: Iterable[Any]) -> list[dict[str, Any]]:
    """Results, each of a group, as plain values for JSON."""
    return [
        {**asdict(each), "group": {**asdict(each.group), "condition": dict(each.group.condition)}} for each in results
    ]


def place_columns(results: Sequence[Any]) -> list[str]:
    """The headings of what `place` says: condition, width, parameters, optimizer."""
    conditions = [f">{name.replace('_', ' ')}" for name, _ in results[0].group.condition]
    return [*conditions, ">width", ">params", "optimizer"]


def place(result: Any) -> list[str]:
    """The first cells of a result's row in a table: which group it is about."""
    group = result.group
    return [*(f"{value:g}" for _, value in group.condition), str(group.width), f"{result.parameters:,}", group.method]


def group_table(
    title: str,
    results: Sequence[Result],
    columns: Sequence[str],
    cells: Callable[[Result], Sequence[str]],
    note: str,
) -> Table:
    """A row a group: its place, then what `cells` says of its result under these columns."""
    places = place_columns(results)
    rows = [[*place(each), *cells(each)] for each in results]
    return Table(title, [*places, *columns], rows, keys=len(places) - 1, notes=[note])


def varying(cells: Iterable[Config]) -> list[str]:
    """The conditions in which the cells differ."""
    cells = list(cells)
    return [name for name in CONDITIONS if len({getattr(cell, name) for cell in cells}) > 1]


def condition_of(cell: Config, names: Iterable[str]) -> tuple[tuple[str, float], ...]:
    """The values of a cell by the names of these conditions."""
    return tuple((name, getattr(cell, name)) for name in names)


def described(condition: Iterable[tuple[str, float]]) -> str:
    """A condition as people read it: label noise 0.25, sparsity 0.9."""
    return ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in condition)
