"""The figure of sharpness along training: what was tracked, beside the threshold of the optimizer in use."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from samlite.report.canvas import new_figure

_LABELS = {
    "batch": "batch sharpness",
    "directional": "directional sharpness",
    "critical": "critical sharpness",
    "preconditioned": "preconditioned λ₁",
    "alignment": "gradient in the top space",
    "edge": "edge of stability",
    "sam-edge": "SAM-edge",
}
_MANY = 100  # points from which on curves have no markers
_THRESHOLDS = ("edge", "sam-edge")
_COLORS = {"batch": "C1", "directional": "C2", "critical": "C4", "preconditioned": "C0", "alignment": "C5"}


def draw_track(records: Sequence[Mapping[str, Any]], path: Path, title: str = "Sharpness along training") -> None:
    """Draw what was tracked against the epoch beside its thresholds; the file's suffix decides the format.

    Without a tracked edge the threshold is 2/lr, where plain full-batch gradient descent stops being stable; momentum,
    decay, noise and SAM move that point. What the optimizer's diagonal or another unit divides has a panel of its own.
    Epochs without a converged value are gaps.
    """
    points = _points(records)
    panels = _panels(points)
    with new_figure(path, (5.2, 3.6 if len(panels) == 1 else 1.2 + 2.4 * len(panels))) as figure:
        every = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, names in zip(every, panels, strict=True):
            _draw(axes, points, names)
        missing = sum(None in record["eigenvalues"] for record in records)
        every[0].set_title(f"{title} ({missing} epochs not converged)" if missing else title)
        every[-1].set_xlabel("epoch")
        if all(point["at"] == int(point["at"]) for point in points):
            from matplotlib.ticker import MaxNLocator

            every[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def _panels(points: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """What is compared with one threshold, together. "2/lr" is that of plain gradient descent, and of single steps."""
    found = list(dict.fromkeys(name for point in points for name in point.get("measures", {})))
    edges = [name for name in _THRESHOLDS if name in found]
    if len(edges) == 2 and all(_same(point["measures"]) for point in points):
        edges = ["edge"]
    above = ["eigenvalues", *(["batch"] if "batch" in found else [])]
    panels = [above, ["preconditioned", *edges]] if "preconditioned" in found else [[*above, *(edges or ["2/lr"])]]
    along = [name for name in ("directional", "critical") if name in found]
    return [*panels, *([[*along, "2/lr"]] if along else []), *([["alignment"]] if "alignment" in found else [])]


def _same(measures: Mapping[str, float | None]) -> bool:
    first, second = (_number(measures.get(name)) for name in _THRESHOLDS)
    return math.isnan(first) or math.isnan(second) or math.isclose(first, second, rel_tol=1e-6)


def _points(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every measurement with the epoch `at` which it was taken; what repeats an epoch's end is left out."""
    points: list[dict[str, Any]] = []
    start = 0
    for record in records:
        end = record.get("steps", start + 1)
        for part in record.get("between", []):
            if start < part["step"] < end:
                points.append({**part, "at": record["epoch"] - 1 + (part["step"] - start) / (end - start)})
        points.append({**record, "at": record["epoch"]})
        start = end
    return points


def _draw(axes: Any, points: Sequence[Mapping[str, Any]], names: list[str]) -> None:
    """One panel."""
    at = [point["at"] for point in points]
    everything: list[float] = []
    for name in names:
        if name == "eigenvalues":
            everything += _draw_eigenvalues(axes, at, points)
            continue
        if name == "2/lr":
            thresholds = [2 / point["lr"] if point["lr"] else math.nan for point in points]
            # A level for each measurement, from the last one to it: a value is that at its end.
            edges = [math.floor(at[0] - 1e-9), *at]
            axes.stairs(thresholds, edges, baseline=None, color="C3", linestyle="--", linewidth=1.5, label=name)
            continue
        values = [_number(point.get("measures", {}).get(name)) for point in points]
        everything += values
        if name in _THRESHOLDS:
            style = "--" if name == "edge" else ":"
            axes.plot(at, values, style, color="C3", linewidth=1.5, label=_LABELS[name], zorder=5)
        else:
            axes.plot(at, values, "o-", color=_COLORS[name], markersize=2.5, linewidth=1.2, label=_LABELS[name])
    finite = [value for value in everything if not math.isnan(value)]
    if "alignment" in names:
        axes.set_ylim(-0.02, 1.02)
    elif finite and min(finite) > 0:
        axes.set_yscale("log")
    axes.set_ylabel("share" if "alignment" in names else "curvature" if len(names) > 1 else "eigenvalue of the Hessian")
    axes.legend(fontsize=9)


def _draw_eigenvalues(axes: Any, at: list[float], points: Sequence[Mapping[str, Any]]) -> list[float]:
    curves = [list(map(_number, values)) for values in zip(*(point["eigenvalues"] for point in points), strict=True)]
    for i, curve in enumerate(curves):  # the largest on top
        style: dict[str, Any] = {"markersize": 4, "linewidth": 2} if i == 0 else {"markersize": 2, "linewidth": 1}
        if len(at) > _MANY:
            style["markersize"] = 0
        label = ("λ₁, the largest", "the next" if len(curves) > 2 else "λ₂")[i] if i < 2 else None
        axes.plot(at, curve, "o-", color="C0", alpha=1 if i == 0 else 0.4, label=label, zorder=3 - i, **style)
    return [value for curve in curves for value in curve]


def _number(value: float | None) -> float:
    return math.nan if value is None else value
