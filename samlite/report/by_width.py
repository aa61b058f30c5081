"""SAM's benefit by width: the tables, the figure and the verdict of a sweep's outcomes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samlite.errors import UsageError, shortened
from samlite.report import radii, trends
from samlite.report.canvas import (
    REFERENCE,
    colors,
    draw_curve,
    draw_intervals,
    label_parameters,
    label_values,
    new_figure,
)
from samlite.report.groups import described, method
from samlite.report.outcomes import Outcome, Report
from samlite.report.table import Table, comparison, interval
from samlite.tasks.metrics import percent, spelled

if TYPE_CHECKING:
    from matplotlib.axes import Axes


# --- Tables


def tables(report: Report) -> list[Table]:
    """The metrics; the quantities of the minima, where moments were measured; and their ratios, SAM over its base."""
    result = [_metrics(report)]
    if any(outcome.nonuniformity for outcome in report.outcomes):
        result.append(_minima(report))
    if any(outcome.comparisons for outcome in report.outcomes):
        result.append(_comparisons(report))
    return [*result, *trends.table(report, trends.trends(report))]


def _metrics(report: Report) -> Table:
    """The metrics, and λ_max if that is all that was measured."""
    scale = percent(report.metric)
    columns = [">n", f">{spelled(report.metric)}", ">improvement"]
    interpolating = any(outcome.interpolating for outcome in report.outcomes)
    if interpolating:
        columns.insert(1, ">interpolate")
    sharpness_alone = _has_sharpness(report) and not any(outcome.nonuniformity for outcome in report.outcomes)
    if sharpness_alone:
        columns.append(">λ_max")

    def cells(outcome: Outcome) -> list[str]:
        result = [str(outcome.metric.n), interval(outcome.metric, scale), interval(outcome.improvement, scale, "+")]
        if interpolating:
            result.insert(1, str(outcome.interpolating))
        if sharpness_alone:
            result.append(interval(outcome.sharpness))
        return result

    title = f"{report.task}: final test {report.metric.replace('_', ' ')} by width"
    return _table(report, title, columns, cells, parameters=True, notes=_notes(report))


def _minima(report: Report) -> Table:
    orders = sorted({order for outcome in report.outcomes for order in outcome.nonuniformity})

    def cells(outcome: Outcome) -> list[str]:
        return [interval(value) for value in (outcome.sharpness, *map(outcome.nonuniformity.get, orders))]

    columns = [">a = λ_max", *(f">s_{order}" for order in orders)]
    return _table(report, "sharpness a and non-uniformity s_k of the minima", columns, cells)


def _comparisons(report: Report, narrow: bool = False) -> Table:
    names = sorted({name for outcome in report.outcomes for name in outcome.comparisons})
    more = ", more alike over the samples (s_k)" if len(names) > 1 else ""
    notes = [f"Geometric mean over seeds; below 1: SAM's minima are flatter (a){more}."]
    verdicts = sum(each.verdict is not None for outcome in report.outcomes for each in outcome.comparisons.values())
    if verdicts > 1:
        notes.append(f"Each of the {verdicts} verdicts uses its own 95 % interval; nothing corrects for their number.")

    def cells(outcome: Outcome) -> list[str]:
        if not outcome.comparisons:
            return []
        return [comparison(outcome.comparisons.get(name), narrow) for name in names]

    compared = {name for row in report.rows for name, outcome in row.optimizers.items() if outcome.comparisons}
    return _table(
        report,
        "sharpness of SAM's minima over its base's",
        names,
        cells,
        optimizer=len(compared) > 1,
        notes=notes,
        narrow=None if narrow else _comparisons(report, narrow=True),
    )


def _table(
    report: Report,
    title: str,
    columns: Sequence[str],
    cells: Callable[[Outcome], list[str]],
    parameters: bool = False,
    optimizer: bool = True,
    **more: Any,
) -> Table:
    """A row an optimizer and width; without cells it is left out."""
    place = [f">{name.replace('_', ' ')}" for name in report.rows[0].condition] + [">width"]
    if parameters:
        place.append(">params")
    rows = []
    for row in report.rows:
        values = [*(f"{value:g}" for value in row.condition.values()), str(row.width)]
        if parameters:
            values.append(f"{row.parameters:,}")
        for name, outcome in row.optimizers.items():
            if own := cells(outcome):
                rows.append([*values, method(name, outcome.rho), *own] if optimizer else [*values, *own])
    names = [*place, "optimizer", *columns] if optimizer else [*place, *columns]
    return Table(title, names, rows, keys=len(place), **more)


def _has_sharpness(report: Report) -> bool:
    return any(outcome.sharpness for outcome in report.outcomes)


def _notes(report: Report) -> list[str]:
    outcomes = report.outcomes
    notes = []
    if any(outcome.metric.half_width is not None for outcome in outcomes):
        notes.append("±: 95 % Student-t interval over seeds.")
    if any(outcome.metric.n == 1 for outcome in outcomes):
        notes.append("One seed gives no interval; use --seeds 3 or more.")
    if any(outcome.improvement for outcome in outcomes):
        better = "" if report.higher_is_better else "; positive: a lower loss with SAM"
        notes.append(f"Improvement: of SAM over its base optimizer, paired by seed{better}.")
    if any(outcome.rho is not None and outcome.improvement is None for outcome in outcomes):
        notes.append("SAM has no improvement where its base optimizer was not run with the same seeds.")
    notes += radii.note(report)
    if not any(outcome.interpolating for outcome in outcomes):
        notes.append("No run interpolates: training loss below 1e-3, every label fitted.")
    for names, state, relevant in (
        (report.unfinished, "not finished", True),
        (report.unmeasured, "without a converged λ_max", _has_sharpness(report)),
        (report.without_moments, "without converged moments", any(outcome.nonuniformity for outcome in outcomes)),
    ):
        if names and relevant:
            notes.append(f"{len(names)} runs {state}: {shortened(names, 4)}.")
    return notes


# --- The figure


def draw(report: Report, path: Path | str) -> None:
    """Draw SAM's improvement against the number of parameters, and beside it each quantity that was measured.

    Bands are 95 % intervals. The file's suffix decides the format. Raises UsageError where there is no improvement.
    """
    outcomes = report.outcomes
    if not any(outcome.improvement for outcome in outcomes):
        raise UsageError("a figure needs SAM and its base optimizer with the same seed, at one width at least")
    names = sorted({name for outcome in outcomes for name in outcome.geometric})
    several_rhos = any(len(outcome.validation) > 1 for outcome in outcomes)
    layout, size = _layout([*names, "rho"] if several_rhos else names)
    with new_figure(path, size) as figure:
        panels = figure.subplot_mosaic(layout)
        _draw_improvement(panels["improvement"], report)
        for name in names:
            _draw_quantity(panels[name], report, name)
        if several_rhos:
            _draw_best_rho(panels["rho"], report)
        # of a panel where every optimizer is drawn, if some was measured
        drawn = (panels[name].get_legend_handles_labels() for name in (*names, "improvement"))
        handles, labels = next(found for found in drawn if found[1])
        if len(labels) > 1:
            figure.legend(handles, labels, fontsize=9, loc="outside lower center", ncols=min(4, len(labels)))
        for panel in panels.values():
            label_parameters(panel, sorted({row.parameters for row in report.rows}))
        figure.suptitle(f"{report.task}: SAM by width ({_seeds(outcomes)})")


def _seeds(outcomes: Sequence[Outcome]) -> str:
    counts = {outcome.metric.n for outcome in outcomes}
    span = " to ".join(map(str, sorted({min(counts), max(counts)})))
    return f"{span} seeds; bands: 95 % intervals" if max(counts) > 1 else f"{span} seed; no intervals"


def _layout(names: list[str]) -> tuple[list[Any], tuple[float, float]]:
    """Rows of panels, and the size of the figure in inches: the improvement, and the quantities in two rows."""
    if len(names) < 2:
        return [["improvement", *names]], (5.2 if not names else 8.6, 3.6)
    if len(names) % 2:
        names = [*names, "."]
    half = len(names) // 2
    return [["improvement", *names[:half]], ["improvement", *names[half:]]], (4.4 + 2.9 * half, 5.2)


def _draw_improvement(panel: "Axes", report: Report) -> None:
    scale = percent(report.metric)
    panel.axhline(0, **REFERENCE)
    for label, (color, outcomes) in _curves(report).items():
        gains = [(count, outcome.improvement) for count, outcome in outcomes]
        draw_intervals(panel, label, color, gains, scale)
    panel.set_title("improvement by SAM")
    unit = " (points)" if scale == 100 else " (decrease)" if report.metric == "loss" else ""
    panel.set_ylabel(f"test {report.metric.replace('_', ' ')}{unit}")


def _draw_quantity(panel: "Axes", report: Report, name: str) -> None:
    """Geometric means on two logarithmic axes; none is drawn where a value is 0."""
    panel.set_yscale("log")
    for label, (color, outcomes) in _curves(report).items():
        values = [(count, outcome.geometric[name]) for count, outcome in outcomes if name in outcome.geometric]
        means = [(count, value.mean) for count, value in values if value.mean is not None]
        band = [(n, value.low, value.high) for n, value in values if value.low is not None and value.high is not None]
        draw_curve(panel, label, color, means, band)
    label_values(panel)
    panel.set_ylabel("geometric mean", fontsize=9)
    panel.set_title(r"sharpness $a = \lambda_\mathrm{max}$" if name == "a" else f"non-uniformity ${name}$")


def _draw_best_rho(panel: "Axes", report: Report) -> None:
    """The rho selected on validation, where several were tried; curves that would coincide are drawn side by side."""
    curves = {
        (label, color): [(n, outcome.rho) for n, outcome in outcomes if len(outcome.validation) > 1 and outcome.rho]
        for label, (color, outcomes) in _curves(report).items()
    }
    drawn = {name: points for name, points in curves.items() if points}
    tried = sorted({rho for outcome in report.outcomes for rho in outcome.validation if rho})
    low, high = tried[0] / 1.3, tried[-1] * 1.3
    for i, ((label, color), points) in enumerate(drawn.items()):
        shift = (high / low) ** (0.015 * (i - (len(drawn) - 1) / 2))
        draw_curve(panel, label, color, [(count, rho * shift) for count, rho in points], [])
    panel.set_yscale("log")
    panel.set_yticks(tried, [f"{rho:g}" for rho in tried])
    panel.set_ylim(low, high)
    panel.minorticks_off()
    panel.set_title(r"best $\rho$ on validation")


def _curves(report: Report) -> dict[str, tuple[str, list[tuple[float, Outcome]]]]:
    """For each optimizer and condition its color, the same in every panel, and its outcomes by parameters.

    Those of a single number of parameters stand side by side.
    """
    curves: dict[str, list[tuple[float, Outcome]]] = {}
    for row in report.rows:
        for name, outcome in row.optimizers.items():
            optimizer = name.upper() if name in ("sgd", "sam") else name
            label = ", ".join(part for part in (optimizer, described(row.condition.items())) if part)
            curves.setdefault(label, []).append((row.parameters, outcome))
    if len({row.parameters for row in report.rows}) == 1:
        middle = (len(curves) - 1) / 2
        for i, (label, points) in enumerate(curves.items()):
            curves[label] = [(count * 1.06 ** (i - middle), outcome) for count, outcome in points]
    return {label: (color, curves[label]) for label, color in colors(list(curves)).items()}
