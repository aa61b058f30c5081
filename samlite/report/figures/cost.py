"""Validation metric against gradient evaluations."""

from collections.abc import Sequence
from pathlib import Path

from samlite.report.by_width import percent
from samlite.report.cost import Cost
from samlite.report.figures.canvas import panels_by_place, save


def cost(found: Sequence[Cost], path: Path) -> None:
    """A panel a width and condition: the mean over seeds of each group, and the budget at which all are compared."""
    figure, places = panels_by_place(found)
    scale = percent(found[0].metric)
    colors = {label: f"C{i}" for i, label in enumerate(dict.fromkeys(each.group.label for each in found))}
    for panel, here in places:
        for each in here:
            gradients, metrics = zip(*each.curve, strict=True)
            heights = [scale * value for value in metrics]
            panel.plot(gradients, heights, color=colors[each.group.label], linewidth=1.5, label=each.group.label)
        panel.axvline(here[0].budget, color="0.6", linewidth=1, linestyle="--")
        panel.set_xlabel("gradient evaluations")
        panel.legend(frameon=False, fontsize=8)
    places[0][0].set_ylabel(f"validation {found[0].metric.replace('_', ' ')}{' %' * (scale == 100)}")
    figure.suptitle("Optimizers by their cost (dashed: equal)", fontsize=11)
    save(figure, path)
