"""`samlite report`."""

from pathlib import Path

import click

from samlite.cli.console import print_json, show_table, stdout
from samlite.cli.options import existing, json_option
from samlite.errors import UsageError


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
    present(folder, view or by, as_json, figure)


def present(folder: Path, claim: str, as_json: bool, figure: Path | None = None) -> None:
    """Report on a sweep, on screen or as JSON, with a figure if asked."""
    from samlite.report.claims import CLAIMS

    view = CLAIMS[claim]
    numbers = view.measure(folder)
    if figure:
        view.draw(numbers, figure)
    if as_json:
        print_json(view.document(numbers))
        return
    for shown in view.tables(numbers):
        show_table(shown)
    stdout.print(f"Verdict: {view.verdict(numbers)}.")
    if figure:
        stdout.print(f"figure: {figure}")
