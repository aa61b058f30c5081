"""Training loss against the step, with the lines of linear convergence."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from samlite.convergence import FLOOR, Convergence
from samlite.figures.canvas import new_figure, save
from samlite.report import count_in_short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 3


def convergence(found: Sequence[Convergence], path: Path, title: str = "") -> None:
    """A panel a width and condition: the loss of every run, and for each group its mean rate, dashed."""
    places = list(dict.fromkeys((each.group.condition, each.group.width) for each in found))
    columns = min(COLUMNS, len(places))
    rows = math.ceil(len(places) / columns)
    figure = new_figure((3.2 * columns + 1, 2.8 * rows + 0.4))
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    colors = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(each.group.label for each in found))}
    for panel, place in zip(panels, places, strict=False):
        here = [each for each in found if (each.group.condition, each.group.width) == place]
        for each in here:
            _draw(panel, each, colors[each.group.label])
        panel.set_yscale("log")
        panel.set_title(f"width {place[1]}, {count_in_short(here[0].parameters)} parameters", fontsize=10)
        panel.set_xlabel("step")
        panel.legend(frameon=False, fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(places) :]:
        panel.set_visible(False)
    for panel in panels[::columns]:
        panel.set_ylabel("training loss")
    figure.suptitle(title or "Linear convergence: training loss, and the mean rate (dashed)", fontsize=11)
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
