"""Linear convergence: a straight line through the logarithm of the training loss against the step.

A loss that falls as exp(-rate step) converges linearly (in the sense of optimization); the paper shows that SAM does,
with overparameterisation. Every run is fitted by least squares over all its epochs, so a learning rate that falls
along the way bends the line: sweep with ``--schedule constant`` for the claim. R² says how straight it is; the interval
of the rate is Student's t at 95 % over seeds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import correlation, linear_regression
from typing import Any

from samlite.intervals import Interval
from samlite.report.groups import Group, document, groups
from samlite.training.runs import read_records, read_result

FLOOR = 1e-6  # losses below are rounding of float32


@dataclass(frozen=True)
class Curve:
    """The training losses of one run, and the line through their logarithms."""

    seed: int
    steps: list[int]
    losses: list[float]
    rate: float | None  # fall of ln(loss) a step; None where fewer than three epochs are left
    r2: float | None


@dataclass(frozen=True)
class Convergence:
    """Of the runs of a group."""

    group: Group
    parameters: int
    curves: list[Curve]
    rate: Interval | None  # a step
    r2: Interval | None

    def to_json(self) -> dict[str, Any]:
        return document(self)


def convergence(folder: Path | str) -> list[Convergence]:
    """Of every group of a sweep's finished runs. Raises UsageError where there are none."""
    folder = Path(folder)
    found = []
    for group, cells in groups(folder).items():
        curves = [_curve(folder / cell.name, cell.seed) for cell in cells]
        parameters = read_result(folder / cells[0].name, "parameters")["parameters"]
        rates = Interval.of(curve.rate for curve in curves if curve.rate is not None)
        straight = Interval.of(curve.r2 for curve in curves if curve.r2 is not None)
        found.append(Convergence(group, parameters, curves, rates, straight))
    return found


def fit(steps: Sequence[float], losses: Sequence[float]) -> tuple[float, float] | None:
    """The rate and R² of ln(loss) = c - rate step by least squares; None for fewer than three points."""
    kept = [(step, math.log(loss)) for step, loss in zip(steps, losses, strict=True) if loss > FLOOR]
    if len(kept) < 3:
        return None
    x, y = zip(*kept, strict=True)
    if min(y) == max(y):
        return 0.0, 1.0
    return -linear_regression(x, y).slope, correlation(x, y) ** 2


def _curve(folder: Path, seed: int) -> Curve:
    found = read_records(folder, "steps", "train_loss")
    steps, losses = [record["steps"] for record in found], [record["train_loss"] for record in found]
    line = fit(steps, losses)
    return Curve(seed, steps, losses, *(line or (None, None)))
