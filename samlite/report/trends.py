"""How SAM's effect changes with width: a slope, which uses every run.

For each seed the least-squares slope of a quantity against log10(parameters) over all widths; its mean over seeds, with
its interval by Student's t at 95 %. Quantities are the improvement of the test metric, and the logarithms of a and s_k
at SAM's minima over its base's. Of several conditions each is compared with the first one by the slopes' difference,
paired by seed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

from samlite.intervals import Interval, paired
from samlite.report.groups import described
from samlite.report.outcomes import Report, Row, is_sam
from samlite.report.table import Table, interval
from samlite.tasks.metrics import percent

IMPROVEMENT = "improvement"


@dataclass(frozen=True)
class Trend:
    """The slope of a quantity of one optimizer, under one condition."""

    condition: dict[str, float]
    optimizer: str
    quantity: str
    """"improvement", or "a" or "s_k" for the natural logarithm of SAM's over its base's."""
    slope: Interval
    """Per tenfold number of parameters, over the seeds that have every width."""
    beyond: Interval | None
    """The slope less that under the first condition; None for the first, or without seeds in common."""


def slopes(points: Mapping[float, Mapping[int, float]]) -> dict[int, float]:
    """The least-squares slope of each seed that every x has, by seed, of values by x and seed; none for a single x."""
    if len(points) < 2:
        return {}
    middle = mean(points)
    spread = sum((x - middle) ** 2 for x in points)
    seeds = set.intersection(*(set(values) for values in points.values()))
    return {seed: sum((x - middle) * values[seed] for x, values in points.items()) / spread for seed in sorted(seeds)}


def trends(report: Report) -> list[Trend]:
    """The slopes of every SAM that has a base optimizer, where there are several widths."""
    found, first = [], dict[tuple[str, str], dict[int, float]]()
    for condition in report.conditions:
        rows = [row for row in report.rows if row.condition == condition]
        for optimizer, quantity, by_seed in _slopes(rows):
            slope = Interval.of(by_seed.values())
            if slope is None:
                continue
            start = first.setdefault((optimizer, quantity), by_seed)
            beyond = None if start is by_seed else paired(by_seed, start)
            found.append(Trend(condition, optimizer, quantity, slope, beyond))
    return found


def of_sam(found: Sequence[Trend], quantity: str) -> list[Trend]:
    """Those of a quantity of SAM itself, a condition each."""
    return [trend for trend in found if is_sam(trend.optimizer) and trend.quantity == quantity]


def growth_of_sam(found: Sequence[Trend], condition: dict[str, float]) -> Interval | None:
    """The slope of SAM's improvement under a condition."""
    return next((trend.slope for trend in of_sam(found, IMPROVEMENT) if trend.condition == condition), None)


def _slopes(rows: Sequence[Row]) -> list[tuple[str, str, dict[int, float]]]:
    """(Optimizer, quantity, slopes by seed) of rows of one condition."""
    optimizers = dict.fromkeys(name for row in rows for name, each in row.optimizers.items() if each.gains)
    result = []
    for optimizer in optimizers:
        own = [(math.log10(row.parameters), row.optimizers[optimizer]) for row in rows if optimizer in row.optimizers]
        quantities = {IMPROVEMENT: {x: outcome.gains for x, outcome in own}}
        for name in sorted({name for _, outcome in own for name in outcome.ratios}):
            quantities[name] = {x: outcome.ratios.get(name, {}) for x, outcome in own}
        result += [(optimizer, name, slopes(points)) for name, points in quantities.items()]
    return result


def document(report: Report) -> dict[str, Any]:
    """A report with its slopes, as plain values for JSON."""
    return {**report.to_json(), "trends": [asdict(trend) for trend in trends(report)]}


def table(report: Report, found: Sequence[Trend]) -> list[Table]:
    """A line a slope; no table where there is none."""
    if not found:
        return []
    several = any(trend.beyond for trend in found)
    rows = []
    for trend in found:
        scale = percent(report.metric) if trend.quantity == IMPROVEMENT else 1
        where = described(trend.condition.items()) or "all runs"
        row = [where, trend.optimizer, _name(trend.quantity), str(trend.slope.n), interval(trend.slope, scale, "+")]
        rows.append([*row, interval(trend.beyond, scale, "+")] if several else row)
    columns = ["", "optimizer", "quantity", ">n", ">slope"]
    notes = [
        "The mean over seeds of the least-squares slope against log10(parameters), with its 95 % interval; positive "
        "for the improvement: SAM's benefit grows."
    ]
    if several:
        columns.append(">beyond the first")
    return [Table("change per tenfold parameters", columns, rows, notes=notes)]


def _name(quantity: str) -> str:
    return quantity if quantity == IMPROVEMENT else f"ln {quantity}, SAM/base"


def amount(value: Interval, metric: str | None) -> str:
    """A slope in words: +0.31 ± 0.12 points per tenfold parameters. Without a metric it is that of a logarithm."""
    scale = 1 if metric is None else percent(metric)
    unit = " points" if scale == 100 else ""
    return f"{interval(value, scale, '+')}{unit} per tenfold parameters"
