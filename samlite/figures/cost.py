"""Validation metric against gradient evaluations."""

import math
from collections.abc import Sequence
from pathlib import Path

from samlite.cost import Cost
from samlite.figures.canvas import new_figure, save
from samlite.report import count_in_short, percent

COLUMNS = 3


def cost(found: Sequence[Cost], path: Path, title: str = "") -> None:
    """A panel a width and condition: the mean over seeds of each group, and the budget at which all are compared."""
    places = list(dict.fromkeys((each.group.condition, each.group.width) for each in found))
    columns = min(COLUMNS, len(places))
    rows = math.ceil(len(places) / columns)
    figure = new_figure((3.2 * columns + 1, 2.8 * rows + 0.4))
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    colors = {label: f"C{i}" for i, label in enumerate(dict.fromkeys(each.group.label for each in found))}
    for panel, place in zip(panels, places, strict=False):
        here = [each for each in found if (each.group.condition, each.group.width) == place]
        for each in here:
            gradients, metrics = zip(*each.curve, strict=True)
            scaled = [percent(each.metric) * value for value in metrics]
            panel.plot(gradients, scaled, color=colors[each.group.label], linewidth=1.5, label=each.group.label)
        panel.axvline(here[0].budget, color="0.6", linewidth=1, linestyle="--")
        panel.set_title(f"width {place[1]}, {count_in_short(here[0].parameters)} parameters", fontsize=10)
        panel.set_xlabel("gradient evaluations")
        panel.legend(frameon=False, fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(places) :]:
        panel.set_visible(False)
    unit = " %" if percent(found[0].metric) == 100 else ""
    for panel in panels[::columns]:
        panel.set_ylabel(f"validation {found[0].metric.replace('_', ' ')}{unit}")
    figure.suptitle(title or "Optimizers by their cost (dashed: the budget they are compared at)", fontsize=11)
    save(figure, path)
