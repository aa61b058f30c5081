"""Figures of runs, of sweeps and of spectra. They need matplotlib, which is imported when one is drawn."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samlite.checkpoints import replacing
from samlite.report import Outcome, Report, count_in_short, described

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from samlite.operator import Density


def _figure(size: tuple[float, float]) -> "Figure":
    """An empty figure, in inches. Raises ImportError with the command that brings matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a figure needs matplotlib: pip install 'samlite[plot]'") from error
    return Figure(figsize=size, layout="constrained")


def track(records: Sequence[Mapping[str, Any]], path: Path, title: str = "") -> None:
    """Draw the tracked eigenvalues against the epoch beside 2/lr, as a PNG written in one step.

    2/lr is where plain full-batch gradient descent stops being stable; momentum, decay, noise and SAM move that point.
    Epochs without a converged value are gaps.
    """
    epochs = [record["epoch"] for record in records]
    curves = [
        [math.nan if value is None else value for value in values]
        for values in zip(*(record["eigenvalues"] for record in records), strict=True)
    ]
    figure = _figure((5.2, 3.6))
    from matplotlib.ticker import MaxNLocator

    axes = figure.add_subplot()
    for i, curve in reversed(list(enumerate(curves))):  # the largest on top
        style: dict[str, Any] = {"markersize": 4, "linewidth": 2} if i == 0 else {"markersize": 2, "linewidth": 1}
        label = ("λ₁, the largest", "the next" if len(curves) > 2 else "λ₂")[i] if i < 2 else None
        axes.plot(epochs, curve, "o-", color="C0", alpha=1 if i == 0 else 0.4, label=label, **style)
    thresholds = [2 / record["lr"] for record in records]
    # A level per epoch, from its start to its end: the value of an epoch is that at its end.
    edges = [epochs[0] - 1, *epochs]
    axes.stairs(thresholds, edges, baseline=None, color="C3", linestyle="--", linewidth=1.5, label="2/lr")
    finite = [value for curve in curves for value in curve if not math.isnan(value)]
    if finite and min(finite) > 0:
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("epoch")
    axes.set_ylabel("Hessian eigenvalue of the training loss")
    missing = sum(None in record["eigenvalues"] for record in records)
    note = f" ({missing} epochs not converged)" if missing else ""
    axes.set_title(f"{title or 'Sharpness along training'}{note}", fontsize=10)
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: (labels[i] == "2/lr", "λ₁" not in labels[i]))
    axes.legend([handles[i] for i in order], [labels[i] for i in order], frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=200, format="png")


def density(found: "Density", path: Path, title: str = "") -> None:
    """Draw the spectral density on a logarithmic axis, with its 95 % interval; the file's suffix decides the format."""
    grid, middle, half = found.grid.numpy(), found.density.numpy(), 1.96 * found.stderr.numpy()
    # A quadrature rule with so few nodes says nothing about densities below those of a thousandth of an eigenvalue.
    floor = 1e-6 * middle.max()
    figure = _figure((5.2, 3.6))
    axes = figure.add_subplot()
    axes.fill_between(
        grid, (middle - half).clip(floor), (middle + half).clip(floor), color="C0", alpha=0.25, linewidth=0
    )
    axes.plot(grid, middle.clip(floor), color="C0", linewidth=1.5)
    axes.axvline(0, color="0.6", linewidth=1, linestyle="--")
    axes.set_yscale("log")
    axes.set_ylim(floor, 3 * middle.max())
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel("spectral density")
    axes.set_title(f"{title + ': ' if title else ''}{found.probes} probes, smoothed by {found.width:.2g}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    kind = path.suffix.removeprefix(".")
    if kind not in figure.canvas.get_supported_filetypes():
        raise ValueError(f"figure must end in a format such as .png or .pdf, got {path}")
    with replacing(path) as beside:
        figure.savefig(beside, dpi=200, format=kind)


def by_width(report: Report, path: Path | str) -> None:
    """Draw SAM's improvement against the number of parameters, and beside it each quantity that was measured.

    Bands are 95 % intervals. The file's suffix decides the format. Raises ValueError where there is no improvement.
    """
    outcomes = [outcome for row in report.rows for outcome in row.optimizers.values()]
    if not any(outcome.improvement for outcome in outcomes):
        raise ValueError("a figure needs SAM and its base optimizer with the same seed, at one width at least")
    names = sorted({name for outcome in outcomes for name in outcome.geometric})
    several_rhos = any(len(outcome.validation) > 1 for outcome in outcomes)
    layout, size = _layout([*names, *["rho"] * several_rhos])
    figure = _figure(size)
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
        _label_parameters(panel, sorted({row.parameters for row in report.rows}))
    seeds = {outcome.metric.n for outcome in outcomes}
    span = " to ".join(map(str, sorted({min(seeds), max(seeds)})))
    note = "bands: 95 % intervals" if max(seeds) > 1 else "no intervals"
    figure.suptitle(f"{report.task}: SAM by width ({span} seed{'s' * (max(seeds) > 1)}; {note})", fontsize=11)
    try:
        figure.savefig(path, dpi=200)
    except ValueError as error:  # an unknown suffix
        raise ValueError(f"figure must end in a format such as .png or .pdf, got {path}: {error}") from None


def _layout(names: list[str]) -> tuple[list[Any], tuple[float, float]]:
    """Rows of panels, and the size of the figure in inches: the improvement, and the quantities in two rows."""
    if len(names) < 2:
        return [["improvement", *names]], (5.2 if not names else 8.6, 3.6)
    names = [*names, *["."] * (len(names) % 2)]
    half = len(names) // 2
    return [["improvement", *names[:half]], ["improvement", *names[half:]]], (4.4 + 2.9 * half, 5.2)


def _improvement(panel: "Axes", report: Report) -> None:
    scale = 100 if report.metric == "accuracy" else 1
    panel.axhline(0, color="0.6", linewidth=1, linestyle="--")
    for label, (color, outcomes) in _curves(report).items():
        gains = [(count, outcome.improvement) for count, outcome in outcomes if outcome.improvement]
        means = [(count, scale * gain.mean) for count, gain in gains]
        halves = [(count, gain.mean, gain.half_width) for count, gain in gains if gain.half_width is not None]
        band = [(count, scale * (mean - half), scale * (mean + half)) for count, mean, half in halves]
        _curve(panel, label, color, means, band)
    panel.set_title("improvement by SAM", fontsize=10)
    panel.set_ylabel("test accuracy (points)" if report.metric == "accuracy" else "test loss (decrease)")


def _quantity(panel: "Axes", report: Report, name: str) -> None:
    """Geometric means on two logarithmic axes; none is drawn where a value is 0."""
    panel.set_yscale("log")
    for label, (color, outcomes) in _curves(report).items():
        found = [(count, outcome.geometric[name]) for count, outcome in outcomes if name in outcome.geometric]
        means = [(count, g.mean) for count, g in found if g.mean is not None]
        band = [(count, g.low, g.high) for count, g in found if g.low is not None and g.high is not None]
        _curve(panel, label, color, means, band)
    _label_values(panel)
    panel.set_ylabel("geometric mean", fontsize=9)
    panel.set_title(r"sharpness $a = \lambda_\mathrm{max}$" if name == "a" else f"non-uniformity ${name}$", fontsize=10)


def _best_rho(panel: "Axes", report: Report) -> None:
    """The rho selected on validation, where several were tried."""
    for label, (color, outcomes) in _curves(report).items():
        found = [(count, outcome.rho) for count, outcome in outcomes if len(outcome.validation) > 1 and outcome.rho]
        _curve(panel, label, color, found, [])
    tried = sorted({rho for row in report.rows for each in row.optimizers.values() for rho in each.validation if rho})
    panel.set_yscale("log")
    panel.set_yticks(tried, [f"{rho:g}" for rho in tried])
    panel.set_ylim(tried[0] / 1.3, tried[-1] * 1.3)
    panel.yaxis.set_minor_locator(_no_ticks())
    panel.set_title(r"best $\rho$ on validation", fontsize=10)


def _curves(report: Report) -> dict[str, tuple[str, list[tuple[int, Outcome]]]]:
    """For each optimizer and condition its color, the same in every panel, and its outcomes by parameters."""
    found: dict[str, list[tuple[int, Outcome]]] = {}
    for row in report.rows:
        for name, outcome in row.optimizers.items():
            label = ", ".join(part for part in (name.upper(), described(row.condition)) if part)
            found.setdefault(label, []).append((row.parameters, outcome))
    return {label: (f"C{i}", outcomes) for i, (label, outcomes) in enumerate(found.items())}


def _curve(
    panel: "Axes", label: str, color: str, means: list[tuple[int, float]], band: list[tuple[int, float, float]]
) -> None:
    """A curve through (parameters, mean), and a band of (parameters, low, high) where there are intervals."""
    if means:
        panel.plot(*zip(*means, strict=True), "o-", label=label, color=color, linewidth=2, markersize=5)
    if band:
        counts, lows, highs = zip(*band, strict=True)
        panel.fill_between(counts, lows, highs, color=color, alpha=0.2, linewidth=0)


def _no_ticks() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _label_values(panel: "Axes") -> None:
    """Ticks at 1, 2 and 5 on a logarithmic axis, only at powers of ten if those are many, evenly if they are few."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter

    low, high = panel.get_ylim()
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5) if low <= digit * 10.0**decade <= high]
    ticks = fine if len(fine) <= 7 else [10.0**decade for decade in decades if low <= 10.0**decade <= high]
    panel.yaxis.set_major_locator(FixedLocator(ticks) if len(ticks) > 1 else MaxNLocator(4))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())


def _label_parameters(panel: "Axes", counts: list[int]) -> None:
    """Parameters on a logarithmic axis, labelled where the sweep has a width and the labels have room."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    panel.set_xscale("log")
    room = 0.16 * math.log(counts[-1] / counts[0])
    ticks = counts[:1]
    for count in counts[1:]:
        if math.log(count / ticks[-1]) >= room:
            ticks.append(count)
    panel.set_xticks(ticks)
    if len(counts) == 1:
        panel.set_xlim(counts[0] / 2, counts[0] * 2)
    panel.xaxis.set_major_formatter(FuncFormatter(lambda count, _: count_in_short(count)))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.tick_params(axis="x", which="minor", length=0)
    panel.set_xlabel("parameters")
    panel.spines[["top", "right"]].set_visible(False)
