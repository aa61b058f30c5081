"""Training loss against the step, with the lines of linear convergence."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from samlite.report.convergence import FLOOR, Convergence
from samlite.report.figures.canvas import panels_by_place, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def convergence(found: Sequence[Convergence], path: Path) -> None:
    """A panel a width and condition: the loss of every run, and for each group its mean rate, dashed."""
    figure, places = panels_by_place(found, share_y=True)
    colors = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(each.group.label for each in found))}
    for panel, here in places:
        for each in here:
            _draw(panel, each, colors[each.group.label])
        panel.set_yscale("log")
        panel.set_xlabel("step")
        panel.legend(frameon=False, fontsize=8)
    places[0][0].set_ylabel("training loss")
    figure.suptitle("Linear convergence (dashed: mean rate)", fontsize=11)
    save(figure, path)


def _draw(panel: "Axes", found: Convergence, color: str) -> None:
    label: str | None = found.group.label
    if found.r2:
        label = f"{label}, R² {found.r2.mean:.3f}"
    for curve in found.curves:
        kept = [(step, loss) for step, loss in zip(curve.steps, curve.losses, strict=True) if loss > FLOOR]
        if kept:
            panel.plot(*zip(*kept, strict=True), color=color, linewidth=1, alpha=0.7, label=label)
            label = None
    if found.rate is None:
        return
    points = [
        (step, math.log(loss) + found.rate.mean * step)
        for curve in found.curves
        for step, loss in zip(curve.steps, curve.losses, strict=True)
        if loss > FLOOR
    ]
    start = mean(height for _, height in points)  # of the line with the mean rate, nearest to all points
    ends = [min(step for step, _ in points), max(step for step, _ in points)]
    panel.plot(ends, [math.exp(start - found.rate.mean * step) for step in ends], "--", color=color, linewidth=1.5)
