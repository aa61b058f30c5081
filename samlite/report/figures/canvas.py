"""What figures share: how one begins and ends, its curves and axes. Matplotlib is imported when one is drawn."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samlite.errors import UsageError
from samlite.files import replacing
from samlite.report.by_width import count_in_short
from samlite.report.groups import described

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 3  # of panels


def new_figure(size: tuple[float, float]) -> "Figure":
    """An empty figure, in inches. Raises ImportError with the command that brings matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a figure needs matplotlib: pip install 'samlite[plot]'") from error
    return Figure(figsize=size, layout="constrained")


def panels_by_place(found: Sequence[Any], share_y: bool = False) -> tuple["Figure", list[tuple["Axes", list[Any]]]]:
    """A figure with a panel for each width and condition, and what belongs there of things with a `group`."""
    places = list(dict.fromkeys((each.group.condition, each.group.width) for each in found))
    columns = min(COLUMNS, len(places))
    rows = math.ceil(len(places) / columns)
    figure = new_figure((3.2 * columns + 1, 2.8 * rows + 0.4))
    panels = figure.subplots(rows, columns, squeeze=False, sharey=share_y).flatten()
    for panel in panels[len(places) :]:
        panel.set_visible(False)
    filled = []
    for panel, place in zip(panels, places, strict=False):
        here = [each for each in found if (each.group.condition, each.group.width) == place]
        condition = "".join(f", {part}" for part in (described(place[0]),) if part)
        panel.set_title(f"width {place[1]}, {count_in_short(here[0].parameters)} parameters{condition}", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
        filled.append((panel, here))
    return figure, filled


def save(figure: "Figure", path: Path) -> None:
    """Write a figure in one step; the path's suffix decides the format."""
    if not path.parent.is_dir():
        raise UsageError(f"figure must be in a folder that exists, got {path}; make {path.parent}")
    kind = path.suffix.removeprefix(".")
    if kind not in figure.canvas.get_supported_filetypes():
        raise UsageError(f"figure must end in a format such as .png or .pdf, got {path}")
    with replacing(path) as beside:
        figure.savefig(beside, dpi=200, format=kind)


def draw_curve(
    panel: "Axes", label: str, color: str, means: list[tuple[int, float]], band: list[tuple[int, float, float]]
) -> None:
    """A curve through (parameters, mean), and a band of (parameters, low, high) where there are intervals."""
    if means:
        panel.plot(*zip(*means, strict=True), "o-", label=label, color=color, linewidth=2, markersize=5)
    if band:
        counts, lows, highs = zip(*band, strict=True)
        panel.fill_between(counts, lows, highs, color=color, alpha=0.2, linewidth=0)


def label_values(panel: "Axes") -> None:
    """Ticks at 1, 2 and 5 on a logarithmic axis, only at powers of ten if those are many, evenly if they are few."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter

    low, high = panel.get_ylim()
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5) if low <= digit * 10.0**decade <= high]
    ticks = fine if len(fine) <= 7 else [10.0**decade for decade in decades if low <= 10.0**decade <= high]
    panel.yaxis.set_major_locator(FixedLocator(ticks) if len(ticks) > 1 else MaxNLocator(4))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())


def label_parameters(panel: "Axes", counts: list[int]) -> None:
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
