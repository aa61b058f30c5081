"""Distances between first weights and solutions, and the spread of solutions, against the number of parameters."""

from collections.abc import Sequence
from pathlib import Path

from samlite.errors import UsageError
from samlite.intervals import Interval
from samlite.report.figures.canvas import draw_curve, label_parameters, new_figure, save
from samlite.report.solutions import Solutions


def solutions(found: Sequence[Solutions], path: Path) -> None:
    """Three panels of the interpolating runs. Raises UsageError where there are none."""
    inside = [each for each in found if each.interpolating]
    if not inside:
        raise UsageError("a figure of solutions needs runs that interpolate; train wider networks, or for longer")
    figure = new_figure((9.6, 3.4))
    travelled, apart, spread = figure.subplots(1, 3)
    names = list(dict.fromkeys((each.group.optimizer, each.group.rho, each.group.condition) for each in inside))
    for i, name in enumerate(names):
        of = [each for each in inside if (each.group.optimizer, each.group.rho, each.group.condition) == name]
        label, color = of[0].group.label, f"C{i}"
        for panel, values in (
            (travelled, [(each.parameters, each.travelled) for each in of]),
            (apart, [(each.parameters, each.apart) for each in of]),
        ):
            found_here = [(count, value) for count, value in values if value]
            means = [(count, value.mean) for count, value in found_here]
            draw_curve(panel, label, color, means, [band for pair in found_here for band in _band(*pair)])
        spreads = [(each.parameters, each.metric_spread) for each in of if each.metric_spread is not None]
        draw_curve(spread, label, color, spreads, [])
    travelled.set_title("distance from the first weights", fontsize=10)
    apart.set_title("from SAM's to its base's solution", fontsize=10)
    spread.set_title("spread of the test metric over seeds", fontsize=10)
    for panel in (travelled, apart, spread):
        label_parameters(panel, sorted({each.parameters for each in inside}))
    travelled.legend(frameon=False, fontsize=8)
    figure.suptitle("Interpolating solutions by width (bands: 95 % intervals)", fontsize=11)
    save(figure, path)


def _band(count: int, value: Interval) -> list[tuple[int, float, float]]:
    half = value.half_width
    return [] if half is None else [(count, value.mean - half, value.mean + half)]
