"""What a sweep says of a claim, in a word: whether its intervals show it.

A claim rests on some intervals, whose positive sign is what it says. Where all are above zero it is supported, where
only some are it shows in trend, and where none is it is not seen: then the half width of the narrowest one is what
could have been seen. Where some are below zero and none above, it is refuted.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import linear_regression, pvariance
from typing import Literal

from samlite.intervals import Interval, paired, student_t
from samlite.report.convergence import STRAIGHT, Convergence
from samlite.report.groups import described
from samlite.report.outcomes import Report, Row, quantities
from samlite.report.table import interval
from samlite.report.trends import IMPROVEMENT, amount, growth_of_sam, of_sam, trends
from samlite.sweep.grid import read_cells
from samlite.sweep.run import finished
from samlite.tasks.metrics import percent

LISTED = 6  # intervals that are listed one by one; of more the signs are counted
Status = Literal["supported", "in trend", "not seen", "mixed", "refuted"]


@dataclass(frozen=True)
class Finding:
    """Whether a claim shows, and by what numbers."""

    status: Status
    numbers: str


def growth(report: Report) -> Finding:
    """SAM's benefit grows with width: its slope says so; in trend alone where it is not there at the largest width.

    Of several conditions the first counts.
    """
    return _growth(report, report.conditions[0])


def last_growth(report: Report) -> Finding:
    """As `growth`, under the last condition: where there is most regularisation."""
    return _growth(report, report.conditions[-1])


def steeper(report: Report) -> Finding:
    """The benefit grows faster under later conditions than under the first."""
    return _finding(_beyond(report, at_the_end=False))


def stronger(report: Report) -> Finding:
    """The benefit grows faster, and is larger at the largest width, under later conditions than under the first."""
    return _finding(_beyond(report, at_the_end=True))


def flatter(report: Report) -> Finding:
    """The largest eigenvalue at SAM's minima is smaller than at its base's, at every width."""
    return _finding(_falls(report, ["a"]))


def more_uniform(report: Report) -> Finding:
    """The samples' Hessians at SAM's minima are more alike than at its base's, at every width and order."""
    return _finding(_falls(report, ["s_2", "s_3", "s_4"]))


def flatter_with_width(report: Report) -> Finding:
    """SAM's minima are the flatter beside its base's the wider the network is."""
    slopes = [trend.slope for trend in of_sam(trends(report), "a")]
    return _finding({f"ln a {amount(slope, None)}": _negative(slope) for slope in slopes})


def no_benefit(report: Report) -> Finding:
    """SAM has no benefit at any width: supported where none is seen, refuted where every width has one."""
    gains = _gain(_rows(report), report)
    found = _finding(gains)
    if all(gain.half_width is None for gain in gains.values()):
        return found
    turned: dict[Status, Status] = {"supported": "refuted", "in trend": "mixed", "mixed": "mixed"}
    return Finding(turned.get(found.status, "supported"), found.numbers)


def best_radius(report: Report) -> Finding:
    """The best radius grows with width: the least-squares slope of its logarithm, with its interval over the widths."""
    points = [(row.parameters, row.sam.rho) for row in _rows(report) if row.sam and row.sam.rho]
    numbers = "rho " + ", ".join(f"{rho:g}" for _, rho in points) + " by width"
    if len(points) < 3:
        return Finding("not seen", numbers)
    x, y = (list(map(math.log10, values)) for values in zip(*points, strict=True))
    slope, intercept = linear_regression(x, y)
    rest = sum((b - slope * a - intercept) ** 2 for a, b in zip(x, y, strict=True)) / (len(x) - 2)
    half = student_t(len(x) - 2) * (rest / (len(x) * pvariance(x))) ** 0.5
    return Finding(_finding({"": Interval(slope, half, len(x))}).status, numbers)


def linear(results: Sequence[Convergence]) -> Finding:
    """The logarithm of the training loss under SAM falls along a straight line."""
    fits = {each.group.width: each.r2.mean for each in results if each.r2 and each.group.rho is not None}
    straight = [r2 >= STRAIGHT for r2 in fits.values()]
    status: Status = "supported" if straight and all(straight) else "in trend" if any(straight) else "not seen"
    return Finding(status, "R² " + ", ".join(f"{r2:.3f} at width {width}" for width, r2 in fits.items()))


def bounds(folder: Path) -> Finding:
    """SAM's minima are where its theory lets it stay, for the lr and radius of each run; the base's are not.

    The bounds are those of the paper for single samples without normalisation: a(1 + ρa) <= 2/η is necessary, and those
    of s_2, s_3 and s_4 are implied under further conditions.
    """
    within: dict[str, list[bool]] = {"SAM": [], "the base": []}
    cells = [cell for cell in read_cells(folder) if finished(folder / cell.name, cell, ["moments"])]
    base = {(cell.width, cell.seed): cell for cell in cells if cell.optimizer == cell.base}
    for cell in cells:
        other = base.get((cell.width, cell.seed))
        if cell.optimizer == "sam" and cell.rho and other:
            within["SAM"].append(_within(quantities(folder / cell.name), cell.lr, cell.rho))
            within["the base"].append(_within(quantities(folder / other.name), cell.lr, cell.rho))
    shares = [sum(values) / max(1, len(values)) for values in within.values()]
    status: Status = "supported" if shares == [1, 0] else "in trend" if shares[0] > shares[1] else "not seen"
    counts = (f"{sum(values)} of {len(values)} minima of {name}" for name, values in within.items())
    return Finding(status, f"within the bounds are {' and '.join(counts)}")


def _within(minimum: Mapping[str, float], lr: float, rho: float) -> bool:
    """Whether a minimum satisfies every bound; that of s_2 is none where lr <= 2 rho."""
    a = minimum["a"]
    most = {"s_3": (2 * lr**2 * rho) ** (-1 / 3), "s_4": (lr * rho) ** -0.5}
    if lr > 2 * rho:
        most["s_2"] = (lr * (lr - 2 * rho)) ** -0.5
    return a * (1 + rho * a) <= 2 / lr and all(minimum.get(name, 0.0) <= bound for name, bound in most.items())


def _growth(report: Report, condition: dict[str, float]) -> Finding:
    slope = growth_of_sam(trends(report), condition)
    last = _gain(_rows(report, condition)[-1:], report)
    numbers = [amount(slope, report.metric)] if slope else []
    text = "; ".join([*numbers, *last]) or "no baseline with the same seeds"
    where = described(condition.items())
    status = _finding({"": slope}).status
    if status == "supported" and not all(gain.positive for gain in last.values()):
        status = "in trend"
    return Finding(status, f"{where}: {text}" if where else text)


def _finding(parts: Mapping[str, Interval | None]) -> Finding:
    known = {text: part for text, part in parts.items() if part and part.half_width is not None}
    up, down = (sum(getattr(part, sign) for part in known.values()) for sign in ("positive", "negative"))
    if not known:
        return Finding("not seen", "too few seeds")
    if up == len(known):
        status: Status = "supported"
    elif up and down:
        status = "mixed"
    else:
        status = "in trend" if up else "refuted" if down else "not seen"
    if len(known) <= LISTED:
        return Finding(status, "; ".join(known))
    return Finding(status, f"{up} of {len(known)} intervals above zero, {down} below")


def _beyond(report: Report, at_the_end: bool) -> dict[str, Interval | None]:
    """By how much the benefit's slope, and its end, are larger under later conditions than under the first."""
    first, *later = report.conditions
    gains = of_sam(trends(report), IMPROVEMENT)
    parts: dict[str, Interval | None] = {}
    for condition in later:
        where = described(condition.items())
        for trend in gains:
            if trend.condition == condition and trend.beyond:
                parts[f"{where}: slope {amount(trend.beyond, report.metric)}"] = trend.beyond
        if at_the_end and (more := _paired(_rows(report, condition), _rows(report, first))):
            parts[f"{where}: {_amount(more, report)} at the largest width"] = more
    return parts


def _rows(report: Report, condition: dict[str, float] | None = None) -> list[Row]:
    """The rows of a condition, by default of the first, by growing width."""
    wanted = report.conditions[0] if condition is None else condition
    return [row for row in report.rows if row.condition == wanted]


def _gain(rows: Sequence[Row], report: Report) -> dict[str, Interval]:
    """The improvement at each width."""
    gains = {row.width: row.sam.improvement for row in rows if row.sam}
    return {f"{_amount(gain, report)} at width {width}": gain for width, gain in gains.items() if gain}


def _amount(value: Interval, report: Report) -> str:
    scale = percent(report.metric)
    return f"{interval(value, scale, '+')}{' points' if scale == 100 else ''}"


def _paired(one: Sequence[Row], other: Sequence[Row]) -> Interval | None:
    """By how much the improvement at the largest width of some rows is larger than that of others."""
    ends = [rows[-1].sam for rows in (one, other) if rows and rows[-1].sam]
    return paired(ends[0].gains, ends[1].gains) if len(ends) == 2 else None


def _falls(report: Report, names: Sequence[str]) -> dict[str, Interval | None]:
    """How far the logarithm of quantities is below that of the base, at each width."""
    parts: dict[str, Interval | None] = {}
    for row in _rows(report):
        for name in names:
            ratios = Interval.of(row.sam.ratios.get(name, {}).values()) if row.sam else None
            if ratios:
                parts[f"{name} × {math.exp(ratios.mean):.2g} at width {row.width}"] = _negative(ratios)
    return parts


def _negative(value: Interval) -> Interval:
    return Interval(-value.mean, value.half_width, value.n)
