"""`samlite report`."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from samlite.cli.console import print_json, shortened, stdout, table
from samlite.cli.options import existing, json_option

if TYPE_CHECKING:
    from samlite.report import Interval, Report


@click.command(short_help="Show a sweep's table, and draw its figure.")
@click.argument("folder", metavar="SWEEP_DIR", callback=existing)
@click.option(
    "--figure",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Draw improvement against parameters to this file.",
)
@json_option
def report(folder: Path, figure: Path | None, as_json: bool) -> None:
    """For each width of a sweep: test metrics, SAM's improvement and sharpness, with 95 % intervals.

    \b
    Examples:
      samlite report runs/digits
      samlite report runs/digits --figure improvement.png
      samlite report runs/digits --json
    """
    present(folder, as_json, figure)


def present(folder: Path, as_json: bool, figure: Path | None = None) -> None:
    """Report on a sweep, on screen or as JSON, with a figure if asked."""
    from samlite.report import plot, summarize

    found = summarize(folder)
    if figure:
        plot(found, figure)
    if as_json:
        print_json(found.to_json())
        return
    _show(found)
    if figure:
        stdout.print(f"figure: {figure}")


def _show(found: "Report") -> None:
    percent = found.metric == "accuracy"
    scale = 100 if percent else 1
    view = table(
        f"{found.task}: final test {found.metric} by width",
        ">width",
        ">params",
        "optimizer",
        ">n",
        f">{found.metric}{' %' if percent else ''}",
        ">improvement",
        ">λ_max",
    )
    for row in found.rows:
        size = (str(row.width), f"{row.parameters:,}")
        for name, outcome in row.optimizers.items():
            view.add_row(
                *size,
                name if outcome.rho is None else f"{name} ρ={outcome.rho:g}",
                str(outcome.metric.n),
                _interval(outcome.metric, scale),
                _interval(outcome.improvement, scale, "+"),
                _interval(outcome.sharpness),
            )
            size = ("", "")
        view.add_section()
    stdout.print(view)
    for note in _notes(found):
        stdout.print(note, style="dim")


def _interval(value: "Interval | None", scale: float = 1, sign: str = "") -> str:
    """Mean ± half width, to two digits of the latter."""
    if value is None:
        return "–"
    middle, half = scale * value.mean, value.half_width
    if half is None:
        return f"{middle:{sign}.4g}"
    half *= scale
    digits = max(0, 1 - math.floor(math.log10(half))) if half else 3
    return f"{middle:{sign}.{digits}f} ± {half:.{digits}f}"


def _notes(found: "Report") -> list[str]:
    outcomes = [outcome for row in found.rows for outcome in row.optimizers.values()]
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
    for names, state in ((found.unfinished, "not finished"), (found.unmeasured, "without a converged λ_max")):
        if names and (state == "not finished" or any(outcome.sharpness for outcome in outcomes)):
            notes.append(f"{len(names)} runs {state}: {shortened(names, 4)}.")
    return notes
