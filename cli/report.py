"""`samlite report`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from samlite.cli.claims import present_convergence, present_cost, present_solutions
from samlite.cli.console import interval, print_json, shortened, stdout, table
from samlite.cli.options import existing, json_option
from samlite.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from samlite.intervals import Comparison
    from samlite.report.by_width import Outcome, Report, Row


@click.command(short_help="Show a sweep's table, and draw its figure.")
@click.argument("folder", metavar="SWEEP_DIR", callback=existing)
@click.option(
    "--figure",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Draw improvement, and what was measured, against parameters to this file.",
)
@click.option("--convergence", "view", flag_value="convergence", help="Rates of linear convergence instead.")
@click.option("--solutions", "view", flag_value="solutions", help="Spread and distances of interpolating runs instead.")
@click.option(
    "--by",
    type=click.Choice(["params", "cost"]),
    default="params",
    show_default=True,
    help="By width, or at equal gradient evaluations.",
)
@json_option
def report(folder: Path, figure: Path | None, view: str | None, by: str, as_json: bool) -> None:
    """For each width of a sweep, with 95 % intervals: test metrics, SAM's improvement, and what was measured
    of the minima, with the ratio of SAM's to those of its base optimizer.

    \b
    Examples:
      samlite report runs/digits
      samlite report runs/digits --figure improvement.png
      samlite report runs/digits --json
      samlite report runs/digits --convergence --figure convergence.png
      samlite report runs/digits --solutions
      samlite report runs/digits --by cost
    """
    if view and by == "cost":
        raise UsageError(f"--by cost must stand alone, got it with --{view}; leave one out")
    views = {
        "convergence": present_convergence,
        "solutions": present_solutions,
        "params": present,
        "cost": present_cost,
    }
    views[view or by](folder, as_json, figure)


def present(folder: Path, as_json: bool, figure: Path | None = None) -> None:
    """Report on a sweep, on screen or as JSON, with a figure if asked."""
    from samlite.report.by_width import summarize
    from samlite.report.figures import by_width

    found = summarize(folder)
    if figure:
        by_width(found, figure)
    if as_json:
        print_json(found.to_json())
        return
    _show(found)
    if figure:
        stdout.print(f"figure: {figure}")


def _show(found: "Report") -> None:
    outcomes = _outcomes(found)
    _show_metrics(found)
    if any(outcome.nonuniformity for outcome in outcomes):
        _show_minima(found)
    if any(outcome.comparisons for outcome in outcomes):
        _show_comparisons(found)
    for note in _notes(found):
        stdout.print(note, style="dim")


def _show_metrics(found: "Report") -> None:
    """The metrics, and λ_max if that is all that was measured."""
    from samlite.report.by_width import percent

    scale = percent(found.metric)
    alone = not any(outcome.nonuniformity for outcome in _outcomes(found))
    sharpness = alone and any(outcome.sharpness for outcome in _outcomes(found))
    interpolating = any(outcome.interpolating for outcome in _outcomes(found))
    view = table(
        f"{found.task}: final test {found.metric.replace('_', ' ')} by width",
        *_condition_columns(found),
        ">width",
        ">params",
        "optimizer",
        ">n",
        *[">interpolate"] * interpolating,
        f">{found.metric.replace('_', ' ')}{' %' if scale == 100 else ''}",
        ">improvement",
        *[">λ_max"] * sharpness,
    )
    for row in found.rows:
        size = (*_condition(row), str(row.width), f"{row.parameters:,}")
        for name, outcome in row.optimizers.items():
            view.add_row(
                *size,
                _label(name, outcome),
                str(outcome.metric.n),
                *[str(outcome.interpolating)] * interpolating,
                interval(outcome.metric, scale),
                interval(outcome.improvement, scale, "+"),
                *[interval(outcome.sharpness)] * sharpness,
            )
            size = ("",) * len(size)
        view.add_section()
    stdout.print(view)


def _show_minima(found: "Report") -> None:
    """The quantities of the minima, in a table of their own as they are wide."""
    orders = sorted({order for outcome in _outcomes(found) for order in outcome.nonuniformity})
    columns = (*_condition_columns(found), ">width", "optimizer", ">a = λ_max", *(f">s_{order}" for order in orders))
    view = table("sharpness a and non-uniformity s_k of the minima", *columns)
    for row in found.rows:
        place = (*_condition(row), str(row.width))
        for name, outcome in row.optimizers.items():
            spread = (interval(outcome.nonuniformity.get(order)) for order in orders)
            view.add_row(*place, _label(name, outcome), interval(outcome.sharpness), *spread)
            place = ("",) * len(place)
        view.add_section()
    stdout.print(view)


def _show_comparisons(found: "Report") -> None:
    names = sorted({name for outcome in _outcomes(found) for name in outcome.comparisons})
    view = _comparisons(found, names)
    if stdout.measure(view, options=stdout.options.update(width=1000)).maximum > stdout.width:
        view = _comparisons(found, names, narrow=True)
    stdout.print("sharpness of SAM's minima over its base's", style="bold")  # wider, perhaps, than the table
    stdout.print(view)
    more = ", more alike over the samples (s_k)" if len(names) > 1 else ""
    stdout.print(f"Geometric mean over seeds; below 1: SAM's minima are flatter (a){more}.", style="dim")


def _comparisons(found: "Report", names: list[str], narrow: bool = False) -> "Table":
    several = len({name for row in found.rows for name, outcome in row.optimizers.items() if outcome.comparisons}) > 1
    view = table("", *_condition_columns(found), ">width", *["optimizer"] * several, *names)
    for row in found.rows:
        for label, outcome in row.optimizers.items():
            if outcome.comparisons:
                cells = (_comparison(outcome.comparisons.get(name), narrow) for name in names)
                view.add_row(*_condition(row), str(row.width), *[_label(label, outcome)] * several, *cells)
        view.add_section()
    return view


def _outcomes(found: "Report") -> "list[Outcome]":
    return [outcome for row in found.rows for outcome in row.optimizers.values()]


def _condition_columns(found: "Report") -> list[str]:
    return [f">{name.replace('_', ' ')}" for name in found.rows[0].condition]


def _condition(row: "Row") -> list[str]:
    return [f"{value:g}" for value in row.condition.values()]


def _label(name: str, outcome: "Outcome") -> str:
    return name if outcome.rho is None else f"{name} ρ={outcome.rho:g}"


def _comparison(found: "Comparison | None", narrow: bool) -> str:
    """A ratio with its interval, under it if that is narrower, and then the verdict."""
    if found is None:
        return "–"
    ratio = found.ratio
    if ratio.mean is None:
        return f"no ratio:\n0 in {ratio.zeros} of {ratio.n} pairs"
    if ratio.low is None or ratio.high is None:
        return _digits(ratio.mean)
    gap = "\n" if narrow else " "
    middle, low, high = map(_digits, (ratio.mean, ratio.low, ratio.high))
    return f"{middle}{gap}({low} to {high})\n{found.verdict}"


def _digits(value: float) -> str:
    """Two digits, or all those of a number in the hundreds and thousands."""
    return f"{value:.0f}" if 99.5 <= value < 1e4 else f"{value:#.2g}".rstrip(".")


def _notes(found: "Report") -> list[str]:
    outcomes = _outcomes(found)
    notes = []
    if any(outcome.metric.half_width is not None for outcome in outcomes):
        notes.append("±: 95 % Student-t interval over seeds.")
    if any(outcome.metric.n == 1 for outcome in outcomes):
        notes.append("One seed gives no interval; use --seeds 3 or more.")
    if any(outcome.improvement for outcome in outcomes):
        better = "" if found.higher_is_better else "; positive: a lower loss with SAM"
        notes.append(f"Improvement: of SAM over its base optimizer, paired by seed{better}.")
    if any(outcome.rho is not None and outcome.improvement is None for outcome in outcomes):
        notes.append("SAM has no improvement where its base optimizer was not run with the same seeds.")
    if not any(outcome.interpolating for outcome in outcomes):
        notes.append("No run interpolates: training loss below 1e-3, every label fitted.")
    verdicts = sum(each.verdict is not None for outcome in outcomes for each in outcome.comparisons.values())
    if verdicts > 1:
        notes.append(f"Each of the {verdicts} verdicts on ratios is at 95 % by itself.")
    for names, state, relevant in (
        (found.unfinished, "not finished", True),
        (found.unmeasured, "without a converged λ_max", any(outcome.sharpness for outcome in outcomes)),
        (found.without_moments, "without converged moments", any(outcome.nonuniformity for outcome in outcomes)),
    ):
        if names and relevant:
            notes.append(f"{len(names)} runs {state}: {shortened(names, 4)}.")
    return notes
