"""The views of `samlite report` on the paper's other claims."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from samlite.cli.console import interval, print_json, stdout, table

if TYPE_CHECKING:
    from samlite.groups import Group


def present_convergence(folder: Path, as_json: bool, path: Path | None) -> None:
    """Linear convergence: the rate of every group, how straight the curves are, and their figure if asked."""
    from samlite import figures
    from samlite.convergence import convergence

    found = convergence(folder)
    if path:
        figures.convergence(found, path)
    if as_json:
        print_json([each.to_json() for each in found])
        return
    names = _conditions([each.group for each in found])
    view = table(
        "linear convergence: ln(training loss) against the step",
        *names,
        ">width",
        ">params",
        "optimizer",
        ">n",
        ">rate (1e-3 a step)",
        ">R²",
    )
    for each in found:
        n = str(len(each.curves))
        view.add_row(*_place(each.group, each.parameters), n, interval(each.rate, 1e3), interval(each.r2))
    stdout.print(view)
    stdout.print(
        "Rate: fall of ln(loss) a step, by least squares over all epochs; ±: 95 % Student-t over seeds.", style="dim"
    )
    _say_figure(path)


def present_solutions(folder: Path, as_json: bool, path: Path | None) -> None:
    """The interpolating solutions: how they spread, how far they travelled, how far apart they are."""
    from samlite import figures
    from samlite.solutions import solutions

    found = solutions(folder)
    if path:
        figures.solutions(found, path)
    if as_json:
        print_json([each.to_json() for each in found])
        return
    names = _conditions([each.group for each in found])
    view = table(
        "interpolating solutions by width",
        *names,
        ">width",
        ">params",
        "optimizer",
        ">interpolate",
        ">test metric",
        ">spread",
        ">spread of ln a",
        ">‖w − w₀‖",
        ">to base",
    )
    for each in found:
        view.add_row(
            *_place(each.group, each.parameters),
            f"{each.interpolating} of {each.runs}",
            interval(each.metric),
            _number(each.metric_spread),
            _number(each.sharpness_spread),
            interval(each.travelled),
            interval(each.apart),
        )
    stdout.print(view)
    note = (
        "Spread: standard deviation over seeds. ‖w − w₀‖: from the first weights. To base: from SAM's solution to that "
        "of its base optimizer, from the same first weights. ±: 95 % Student-t over seeds."
    )
    stdout.print(note, style="dim")
    _say_figure(path)


def present_cost(folder: Path, as_json: bool, path: Path | None) -> None:
    """Every optimizer after the same number of gradient evaluations, and after all its epochs."""
    from samlite import figures
    from samlite.cost import costs
    from samlite.report import percent

    found = costs(folder)
    if path:
        figures.cost(found, path)
    if as_json:
        print_json([each.to_json() for each in found])
        return
    metric, scale = found[0].metric.replace("_", " "), percent(found[0].metric)
    names = _conditions([each.group for each in found])
    view = table(
        f"validation {metric}{' %' * (scale == 100)} at equal cost",
        *names,
        ">width",
        ">params",
        "optimizer",
        ">budget",
        ">epochs",
        ">at budget",
        ">in all",
        ">at the end",
    )
    for each in found:
        view.add_row(
            *_place(each.group, each.parameters),
            f"{each.budget:,}",
            f"{each.epochs:.3g}",
            interval(each.at_budget, scale),
            f"{each.gradients:,}",
            interval(each.at_end, scale),
        )
    stdout.print(view)
    note = "Budget and in all: gradient evaluations of a batch. ±: 95 % Student-t over seeds."
    stdout.print(note, style="dim")
    _say_figure(path)


def _conditions(groups: "Sequence[Group]") -> list[str]:
    return [f">{name.replace('_', ' ')}" for name, _ in groups[0].condition]


def _place(group: "Group", parameters: int) -> list[str]:
    label = group.optimizer if group.rho is None else f"{group.optimizer} ρ={group.rho:g}"
    return [*(f"{value:g}" for _, value in group.condition), str(group.width), f"{parameters:,}", label]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"


def _say_figure(path: Path | None) -> None:
    if path:
        stdout.print(f"figure: {path}")
