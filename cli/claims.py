"""The views of `samlite report` on the paper's other claims."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samlite.cli.console import interval, print_json, stdout, table

if TYPE_CHECKING:
    from samlite.report.groups import Group


def present_convergence(folder: Path, as_json: bool, path: Path | None) -> None:
    """Linear convergence: the rate of every group, how straight the curves are, and their figure if asked."""
    from samlite.report import figures
    from samlite.report.convergence import convergence

    _present(
        convergence(folder),
        as_json,
        path,
        figures.convergence,
        "linear convergence: ln(training loss) against the step",
        (">n", ">rate (1e-3 a step)", ">R²"),
        lambda each: [str(len(each.curves)), interval(each.rate, 1e3), interval(each.r2)],
        "Rate: fall of ln(loss) a step, by least squares over all epochs; ±: 95 % Student-t over seeds.",
    )


def present_solutions(folder: Path, as_json: bool, path: Path | None) -> None:
    """The interpolating solutions: how they spread, how far they travelled, how far apart they are."""
    from samlite.report import figures
    from samlite.report.solutions import solutions

    _present(
        solutions(folder),
        as_json,
        path,
        figures.solutions,
        "interpolating solutions by width",
        (">interpolate", ">test metric", ">spread", ">spread of ln a", ">‖w − w₀‖", ">to base"),
        lambda each: [
            f"{each.interpolating} of {each.runs}",
            interval(each.metric),
            _number(each.metric_spread),
            _number(each.sharpness_spread),
            interval(each.travelled),
            interval(each.apart),
        ],
        "Spread: standard deviation over seeds. ‖w − w₀‖: from the first weights. To base: from SAM's solution to that "
        "of its base optimizer, from the same first weights. ±: 95 % Student-t over seeds.",
    )


def present_cost(folder: Path, as_json: bool, path: Path | None) -> None:
    """Every optimizer after the same number of gradient evaluations, and after all its epochs."""
    from samlite.report import figures
    from samlite.report.by_width import percent
    from samlite.report.cost import costs

    found = costs(folder)
    scale = percent(found[0].metric)
    _present(
        found,
        as_json,
        path,
        figures.cost,
        f"validation {found[0].metric.replace('_', ' ')}{' %' * (scale == 100)} at equal cost",
        (">budget", ">epochs", ">at budget", ">in all", ">at the end"),
        lambda each: [
            f"{each.budget:,}",
            f"{each.epochs:.3g}",
            interval(each.at_budget, scale),
            f"{each.gradients:,}",
            interval(each.at_end, scale),
        ],
        "Budget and in all: gradient evaluations of a batch. ±: 95 % Student-t over seeds.",
    )


def _present(
    found: Sequence[Any],
    as_json: bool,
    path: Path | None,
    draw: Callable[[Sequence[Any], Path], None],
    title: str,
    columns: Sequence[str],
    cells: Callable[[Any], list[str]],
    note: str,
) -> None:
    """A row a group, or JSON, and a figure if asked."""
    if path:
        draw(found, path)
    if as_json:
        print_json([each.to_json() for each in found])
        return
    conditions = [f">{name.replace('_', ' ')}" for name, _ in found[0].group.condition]
    view = table(title, *conditions, ">width", ">params", "optimizer", *columns)
    for each in found:
        view.add_row(*_place(each.group, each.parameters), *cells(each))
    stdout.print(view)
    stdout.print(note, style="dim")
    if path:
        stdout.print(f"figure: {path}")


def _place(group: "Group", parameters: int) -> list[str]:
    return [*(f"{value:g}" for _, value in group.condition), str(group.width), f"{parameters:,}", group.method]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"
