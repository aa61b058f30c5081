"""The result of a sweep against the number of parameters."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from samlite.errors import UsageError
from samlite.report.by_width import Outcome, Report, percent
from samlite.report.figures.canvas import draw_curve, label_parameters, label_values, new_figure, save
from samlite.report.groups import described

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def by_width(report: Report, path: Path | str) -> None:
    """Draw SAM's improvement against the number of parameters, and beside it each quantity that was measured.

    Bands are 95 % intervals. The file's suffix decides the format. Raises UsageError where there is no improvement.
    """
    outcomes = [outcome for row in report.rows for outcome in row.optimizers.values()]
    if not any(outcome.improvement for outcome in outcomes):
        raise UsageError("a figure needs SAM and its base optimizer with the same seed, at one width at least")
    names = sorted({name for outcome in outcomes for name in outcome.geometric})
    several_rhos = any(len(outcome.validation) > 1 for outcome in outcomes)
    layout, size = _layout([*names, *["rho"] * several_rhos])
    figure = new_figure(size)
    panels = figure.subplot_mosaic(layout)
    _improvement(panels["improvement"], report)
    for name in names:
        _quantity(panels[name], report, name)
    if several_rhos:
        _best_rho(panels["rho"], report)
    if len(_curves(report)) > 1:
        # where every optimizer is drawn, if some was measured
        labelled = next(panels[name] for name in (*names, "improvement") if panels[name].get_legend_handles_labels()[1])
        labelled.legend(frameon=False, fontsize=9)
    for panel in panels.values():
        label_parameters(panel, sorted({row.parameters for row in report.rows}))
    seeds = {outcome.metric.n for outcome in outcomes}
    span = " to ".join(map(str, sorted({min(seeds), max(seeds)})))
    note = "bands: 95 % intervals" if max(seeds) > 1 else "no intervals"
    figure.suptitle(f"{report.task}: SAM by width ({span} seed{'s' * (max(seeds) > 1)}; {note})", fontsize=11)
    save(figure, Path(path))


def _layout(names: list[str]) -> tuple[list[Any], tuple[float, float]]:
    """Rows of panels, and the size of the figure in inches: the improvement, and the quantities in two rows."""
    if len(names) < 2:
        return [["improvement", *names]], (5.2 if not names else 8.6, 3.6)
    names = [*names, *["."] * (len(names) % 2)]
    half = len(names) // 2
    return [["improvement", *names[:half]], ["improvement", *names[half:]]], (4.4 + 2.9 * half, 5.2)


def _improvement(panel: "Axes", report: Report) -> None:
    scale = percent(report.metric)
    panel.axhline(0, color="0.6", linewidth=1, linestyle="--")
    for label, (color, outcomes) in _curves(report).items():
        gains = [(count, outcome.improvement) for count, outcome in outcomes if outcome.improvement]
        means = [(count, scale * gain.mean) for count, gain in gains]
        halves = [(count, gain.mean, gain.half_width) for count, gain in gains if gain.half_width is not None]
        band = [(count, scale * (mean - half), scale * (mean + half)) for count, mean, half in halves]
        draw_curve(panel, label, color, means, band)
    panel.set_title("improvement by SAM", fontsize=10)
    unit = " (points)" if scale == 100 else " (decrease)" if report.metric == "loss" else ""
    panel.set_ylabel(f"test {report.metric.replace('_', ' ')}{unit}")


def _quantity(panel: "Axes", report: Report, name: str) -> None:
    """Geometric means on two logarithmic axes; none is drawn where a value is 0."""
    panel.set_yscale("log")
    for label, (color, outcomes) in _curves(report).items():
        found = [(count, outcome.geometric[name]) for count, outcome in outcomes if name in outcome.geometric]
        means = [(count, g.mean) for count, g in found if g.mean is not None]
        band = [(count, g.low, g.high) for count, g in found if g.low is not None and g.high is not None]
        draw_curve(panel, label, color, means, band)
    label_values(panel)
    panel.set_ylabel("geometric mean", fontsize=9)
    panel.set_title(r"sharpness $a = \lambda_\mathrm{max}$" if name == "a" else f"non-uniformity ${name}$", fontsize=10)


def _best_rho(panel: "Axes", report: Report) -> None:
    """The rho selected on validation, where several were tried."""
    for label, (color, outcomes) in _curves(report).items():
        found = [(count, outcome.rho) for count, outcome in outcomes if len(outcome.validation) > 1 and outcome.rho]
        draw_curve(panel, label, color, found, [])
    tried = sorted({rho for row in report.rows for each in row.optimizers.values() for rho in each.validation if rho})
    panel.set_yscale("log")
    panel.set_yticks(tried, [f"{rho:g}" for rho in tried])
    panel.set_ylim(tried[0] / 1.3, tried[-1] * 1.3)
    panel.minorticks_off()
    panel.set_title(r"best $\rho$ on validation", fontsize=10)


def _curves(report: Report) -> dict[str, tuple[str, list[tuple[int, Outcome]]]]:
    """For each optimizer and condition its color, the same in every panel, and its outcomes by parameters."""
    found: dict[str, list[tuple[int, Outcome]]] = {}
    for row in report.rows:
        for name, outcome in row.optimizers.items():
            method = name.upper() if name in ("sgd", "sam") else name
            label = ", ".join(part for part in (method, described(row.condition.items())) if part)
            found.setdefault(label, []).append((row.parameters, outcome))
    return {label: (f"C{i}", outcomes) for i, (label, outcomes) in enumerate(found.items())}
