"""What figures share: their look, how one begins and ends, its curves and axes.

Matplotlib is imported when one is drawn.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samlite.errors import UsageError, missing
from samlite.files import replacing
from samlite.intervals import Interval
from samlite.models import count_in_short
from samlite.report.groups import described

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 3  # of panels
STYLE: Any = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "figure.titlesize": 11,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 5,
    "savefig.dpi": 200,
}
REFERENCE: dict[str, Any] = {"color": "0.6", "linewidth": 1, "linestyle": "--"}  # a line that curves are compared with


@contextmanager
def new_figure(path: Path | str, size: tuple[float, float]) -> Iterator["Figure"]:
    """An empty figure, in inches, that is written in one step at the end; the path's suffix decides the format.

    Raises ImportError with the command that brings matplotlib, and UsageError for a path that no figure can have.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing("a figure", "matplotlib", "plot") from error
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size)
        yield figure
        _save(figure, Path(path))


def _save(figure: "Figure", path: Path) -> None:
    if not path.parent.is_dir():
        raise UsageError(f"figure must be in a folder that exists, got {path}; make {path.parent}")
    kind = path.suffix.removeprefix(".")
    if kind not in figure.canvas.get_supported_filetypes():
        raise UsageError(f"figure must end in a format such as .png or .pdf, got {path}")
    with replacing(path) as beside:
        figure.savefig(beside, format=kind)


@contextmanager
def panels_by_place(
    path: Path | str, results: Sequence[Any], title: str, share_y: bool = False
) -> Iterator[list[tuple["Axes", list[Any]]]]:
    """A figure with a panel for each width and condition, and what belongs there of results with a `group`."""
    places = list(dict.fromkeys((each.group.condition, each.group.width) for each in results))
    columns = min(COLUMNS, len(places))
    rows = math.ceil(len(places) / columns)
    with new_figure(path, (3.2 * columns + 1, 2.8 * rows + 0.4)) as figure:
        panels = figure.subplots(rows, columns, squeeze=False, sharey=share_y).flatten()
        for panel in panels[len(places) :]:
            panel.set_visible(False)
        filled = []
        for panel, place in zip(panels, places, strict=False):
            here = [each for each in results if (each.group.condition, each.group.width) == place]
            condition = "".join(f", {part}" for part in (described(place[0]),) if part)
            panel.set_title(f"width {place[1]}, {count_in_short(here[0].parameters)} parameters{condition}")
            filled.append((panel, here))
        figure.suptitle(title)
        yield filled


def colors(labels: Sequence[str]) -> dict[str, str]:
    """A color for each label, the same in every panel."""
    return {label: f"C{i}" for i, label in enumerate(dict.fromkeys(labels))}


def draw_curve(
    panel: "Axes",
    label: str,
    color: str,
    means: Sequence[tuple[float, float]],
    band: Sequence[tuple[float, float, float]],
) -> None:
    """A curve through (parameters, mean), and a band of (parameters, low, high) where there are intervals."""
    if means:
        panel.plot(*zip(*means, strict=True), "o-", label=label, color=color, linewidth=2)
    if band:
        counts, lows, highs = zip(*band, strict=True)
        panel.fill_between(counts, lows, highs, color=color, alpha=0.2, linewidth=0)
        if len(band) == 1:  # of no width
            panel.vlines(counts, lows, highs, color=color, alpha=0.5)


def draw_intervals(
    panel: "Axes", label: str, color: str, values: Sequence[tuple[float, Interval | None]], scale: float = 1
) -> None:
    """The curve of (parameters, interval), scaled; None is left out."""
    known = [(count, scale * value.mean, value.half_width) for count, value in values if value]
    band = [(count, mean - scale * half, mean + scale * half) for count, mean, half in known if half is not None]
    draw_curve(panel, label, color, [(count, mean) for count, mean, _ in known], band)


def label_values(panel: "Axes") -> None:
    """Ticks at 1, 2 and 5 on a logarithmic axis, and at powers of ten alone where those are many."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    low, high = panel.get_ylim()
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,), numticks=7))
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
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
