"""Linear convergence: a straight line through the logarithm of the training loss against the step.

A loss that falls as exp(-rate step) converges linearly (in the sense of optimization); the paper shows that SAM does,
with overparameterisation. Every run is fitted by least squares over its epochs, up to the first one whose loss has come
down to three times its floor: the median loss of the last tenth of the epochs, which steps of that size and batches do
not leave. A learning rate that falls along the way bends the line: sweep with ``--schedule constant`` for the claim. R²
says how straight it is; the interval of the rate is Student's t at 95 % over seeds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import correlation, linear_regression, mean, median
from typing import TYPE_CHECKING

from samlite.intervals import Interval
from samlite.report.canvas import colors, panels_by_place
from samlite.report.groups import Group, group_table, groups
from samlite.report.table import Table, interval
from samlite.training.runs import read_records, read_result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FLOOR = 1e-6  # losses below are rounding of float32
ABOVE = 3  # times the floor of a run, where the fit ends
STRAIGHT = 0.95  # an R² that counts as a straight line


@dataclass(frozen=True)
class Curve:
    """The training losses of one run, and the line through their logarithms."""

    seed: int
    steps: list[int]
    losses: list[float]
    fitted: int  # epochs, from the first, which the line goes through
    rate: float | None  # fall of ln(loss) a step; None where fewer than three epochs are left
    r2: float | None


@dataclass(frozen=True)
class Convergence:
    """The convergence of the runs of a group."""

    group: Group
    parameters: int
    curves: list[Curve]
    rate: Interval | None  # a step
    r2: Interval | None


def convergence(folder: Path | str) -> list[Convergence]:
    """The convergence of every group of a sweep's finished runs. Raises UsageError where there are none."""
    folder = Path(folder)
    results = []
    for group, cells in groups(folder).items():
        curves = [_curve(folder / cell.name, cell.seed) for cell in cells]
        parameters = read_result(folder / cells[0].name, "parameters")["parameters"]
        rates = Interval.of(curve.rate for curve in curves if curve.rate is not None)
        straight = Interval.of(curve.r2 for curve in curves if curve.r2 is not None)
        results.append(Convergence(group, parameters, curves, rates, straight))
    return results


def fit(steps: Sequence[float], losses: Sequence[float]) -> tuple[float, float] | None:
    """The rate and R² of ln(loss) = c - rate step by least squares; None for fewer than three points."""
    kept = [(step, math.log(loss)) for step, loss in zip(steps, losses, strict=True) if loss > FLOOR]
    if len(kept) < 3:
        return None
    x, y = zip(*kept, strict=True)
    if min(y) == max(y):
        return 0.0, 1.0
    return -linear_regression(x, y).slope, correlation(x, y) ** 2


def before_the_floor(losses: Sequence[float]) -> int:
    """How many epochs pass before the loss is down at its floor; all of them where those are fewer than three."""
    floor = median(losses[-max(1, len(losses) // 10) :])
    down = next((epoch for epoch, loss in enumerate(losses) if loss <= ABOVE * floor), len(losses))
    return down if down >= 3 else len(losses)


def _curve(folder: Path, seed: int) -> Curve:
    records = read_records(folder, "steps", "train_loss")
    steps, losses = [record["steps"] for record in records], [record["train_loss"] for record in records]
    fitted = before_the_floor(losses)
    line = fit(steps[:fitted], losses[:fitted])
    return Curve(seed, steps, losses, fitted, *(line or (None, None)))


def tables(results: Sequence[Convergence]) -> list[Table]:
    """The rate of every group, and how straight its curves are."""
    return [
        group_table(
            "linear convergence: ln(training loss) against the step",
            results,
            (">n", ">rate (1e-3 a step)", ">R²"),
            lambda each: [str(len(each.curves)), interval(each.rate, 1e3), interval(each.r2)],
            "Rate: fall of ln(loss) a step, by least squares over the epochs before the loss is at its floor; ±: 95 % "
            "Student-t over seeds.",
        )
    ]


def verdict(results: Sequence[Convergence]) -> str:
    """Whether training with SAM converges linearly, and faster with width."""
    known = [each for each in results if each.rate and each.r2 and each.group.rho is not None]
    if not known:
        return "no run of SAM has enough epochs for a rate"
    straight = ", ".join(f"{each.r2.mean:.3f} at width {each.group.width}" for each in known if each.r2)
    rates = [each.rate.mean for each in known if each.rate]
    faster = "grows with width" if rates == sorted(rates) else "does not grow steadily with width"
    agrees = min(each.r2.mean for each in known if each.r2) >= STRAIGHT
    end = "this agrees" if agrees else "a straight line is no more than a rough description here"
    return f"under SAM R² of the straight line is {straight}, and its rate {faster}: {end}"


def draw(results: Sequence[Convergence], path: Path | str) -> None:
    """A panel a width and condition: the loss of every run, and for each group its mean rate, dashed."""
    color = colors([each.group.label for each in results])
    with panels_by_place(path, results, "Linear convergence (dashed: mean rate)", share_y=True) as places:
        for panel, here in places:
            for each in here:
                _draw_group(panel, each, color[each.group.label])
            panel.set(yscale="log", xlabel="step")
            panel.legend()
        places[0][0].set_ylabel("training loss")


def _draw_group(panel: "Axes", result: Convergence, color: str) -> None:
    label: str | None = result.group.label
    if result.r2:
        label = f"{label}, R² {result.r2.mean:.3f}"
    points = []
    for curve in result.curves:
        kept = [(step, loss) for step, loss in zip(curve.steps, curve.losses, strict=True) if loss > FLOOR]
        if kept:
            panel.plot(*zip(*kept, strict=True), color=color, linewidth=1, alpha=0.7, label=label)
            label = None
        points += [point for point in kept if point[0] <= curve.steps[curve.fitted - 1]]
    if result.rate is None:
        return
    rate = result.rate.mean
    start = mean(math.log(loss) + rate * step for step, loss in points)  # the line of that rate nearest to all points
    ends = [min(step for step, _ in points), max(step for step, _ in points)]
    panel.plot(ends, [math.exp(start - rate * step) for step in ends], "--", color=color)
