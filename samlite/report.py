"""The result of a sweep by width: metrics, SAM's improvement and sharpness, with their intervals.

Intervals are Student's t at 95 % over seeds; one seed gives none. The improvement is the final test
metric with SAM less that of its base optimizer, paired by seed, with the sign turned where a lower
metric is better: positive means that SAM is better. Of several rhos the one that is best on validation
counts, chosen for each width.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from samlite import tasks
from samlite.checkpoints import read_json
from samlite.config import Config
from samlite.sweep import finished, read, sharpness


@dataclass(frozen=True)
class Interval:
    """A mean over n seeds and the half width of its 95 % interval, None for one seed."""

    mean: float
    half_width: float | None
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Interval | None":
        sample = list(values)
        if not sample:
            return None
        if len(sample) == 1:
            return cls(sample[0], None, 1)
        return cls(mean(sample), student_t(len(sample) - 1) * stdev(sample) / len(sample) ** 0.5, len(sample))


@dataclass(frozen=True)
class Outcome:
    """One optimizer at one width, over its seeds."""

    metric: Interval  # final test metric
    best: Interval  # test metric at the epoch that is best on validation
    interpolating: int  # how many of the runs interpolate
    rho: float | None  # SAM's, selected on validation
    sharpness: Interval | None  # largest Hessian eigenvalue
    improvement: Interval | None  # over the base optimizer, for SAM


@dataclass(frozen=True)
class Row:
    width: int
    parameters: int
    optimizers: dict[str, Outcome]


@dataclass(frozen=True)
class Report:
    """A sweep's rows by growing width, and the names of the runs that are not in them."""

    task: str
    metric: str
    higher_is_better: bool
    rows: tuple[Row, ...]
    unfinished: tuple[str, ...]
    unmeasured: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def summarize(folder: Path | str) -> Report:
    """Report on a sweep, finished or not. Raises ValueError where no run is finished."""
    folder = Path(folder)
    cells = read(folder)
    results = {
        cell: read_json(folder / cell.name / "result.json") for cell in cells if finished(folder / cell.name, cell)
    }
    if not results:
        raise ValueError(f"{folder} must hold a finished run; repeat its sweep")
    task = tasks.get(cells[0].task)
    eigenvalues = {cell: sharpness(folder / cell.name) for cell in results}
    try:
        rows = [
            _row(width, {cell: results[cell] for cell in results if cell.width == width}, eigenvalues, task)
            for width in sorted({cell.width for cell in results})
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder} has a result.json that no run wrote (it lacks {error})") from None
    return Report(
        task.name,
        task.metric,
        task.higher_is_better,
        tuple(rows),
        tuple(cell.name for cell in cells if cell not in results),
        tuple(cell.name for cell in results if eigenvalues[cell] is None),
    )


def plot(report: Report, path: Path | str) -> None:
    """Draw SAM's improvement against the number of parameters, with its interval as a band.

    The file's suffix decides the format. Raises ValueError where there is nothing to draw.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter
    except ImportError as error:
        raise ImportError("a figure needs matplotlib: pip install 'samlite[plot]'") from error
    curves: dict[str, list[tuple[int, Interval]]] = defaultdict(list)
    for row in report.rows:
        for name, outcome in row.optimizers.items():
            if outcome.improvement:
                curves[name].append((row.parameters, outcome.improvement))
    if not curves:
        raise ValueError("a figure needs SAM and its base optimizer with the same seed, at one width at least")
    percent = 100 if report.metric == "accuracy" else 1
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(0, color="0.6", linewidth=1, linestyle="--")
    for name, points in curves.items():
        parameters = [count for count, _ in points]
        (line,) = axes.plot(
            parameters, [percent * gain.mean for _, gain in points], "o-", label=name.upper(), linewidth=2
        )
        band = [(count, gain.mean, gain.half_width) for count, gain in points if gain.half_width is not None]
        if band:
            axes.fill_between(
                [count for count, _, _ in band],
                [percent * (middle - half) for _, middle, half in band],
                [percent * (middle + half) for _, middle, half in band],
                color=line.get_color(),
                alpha=0.2,
                linewidth=0,
            )
    axes.set_xscale("log")
    axes.set_xticks([row.parameters for row in report.rows], minor=False)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: count_in_short(count)))
    axes.minorticks_off()
    axes.set_xlabel("parameters")
    unit = "test accuracy (points)" if report.metric == "accuracy" else "test loss (decrease)"
    axes.set_ylabel(f"improvement in {unit}")
    seeds = {gain.n for points in curves.values() for _, gain in points}
    span = f"{min(seeds)}" if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
    note = "mean and 95 % interval" if max(seeds) > 1 else "one seed: no interval"
    axes.set_title(f"{report.task}: improvement by SAM ({note}, n = {span})", fontsize=10)
    if len(curves) > 1:
        axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path, dpi=200)
    except ValueError as error:  # an unknown suffix
        raise ValueError(f"figure must end in a format such as .png or .pdf, got {path}: {error}") from None


def count_in_short(count: float) -> str:
    """A number of parameters in two or three digits: 587, 2.6k, 14k, 5.4M."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.{1 if count < 10 * size else 0}f}{suffix}"
    return f"{count:.0f}"


def student_t(degrees: int, confidence: float = 0.95) -> float:
    """The t with P(|T| < t) = confidence, by bisection of the closed form for whole degrees of freedom.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    odd = degrees % 2

    def within(angle: float) -> float:
        term, total = math.cos(angle) ** odd, 0.0
        for power in range(odd, degrees - 1, 2):
            total += term
            term *= math.cos(angle) ** 2 * (power + 1) / (power + 2)
        sine = math.sin(angle) * total
        return 2 / math.pi * (angle + sine) if odd else sine

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < confidence else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _row(
    width: int,
    results: dict[Config, dict[str, Any]],
    eigenvalues: dict[Config, float | None],
    task: tasks.Task,
) -> Row:
    by_rho: dict[str, dict[float, list[Config]]] = defaultdict(lambda: defaultdict(list))
    for cell in results:
        by_rho[_label(cell)][cell.rho].append(cell)
    chosen = {name: _best_on_validation(list(of.values()), results, task) for name, of in by_rho.items()}
    final = {cell: result["final"]["test_metric"] for cell, result in results.items()}
    sign = 1 if task.higher_is_better else -1
    optimizers = {}
    for name, cells in chosen.items():
        metric = Interval.of(final[cell] for cell in cells)
        best = Interval.of(results[cell]["best"]["test_metric"] for cell in cells)
        assert metric and best  # a group of runs is never empty
        baseline = {cell.seed: final[cell] for cell in chosen.get(cells[0].base, [])}
        sam = cells[0].optimizer == "sam"
        gains = [sign * (final[cell] - baseline[cell.seed]) for cell in cells if cell.seed in baseline]
        optimizers[name] = Outcome(
            metric,
            best,
            sum(results[cell]["interpolates"] for cell in cells),
            cells[0].rho if sam else None,
            Interval.of(value for cell in cells if (value := eigenvalues[cell]) is not None),
            Interval.of(gains) if sam else None,
        )
    return Row(width, next(iter(results.values()))["parameters"], optimizers)


def _label(cell: Config) -> str:
    return f"sam-{cell.base}" if cell.optimizer == "sam" and cell.base != "sgd" else cell.optimizer


def _best_on_validation(
    groups: list[list[Config]], results: dict[Config, dict[str, Any]], task: tasks.Task
) -> list[Config]:
    """The runs of one rho: only those with the most seeds compete, for no rho to win by a lucky few."""
    most = max(map(len, groups))

    def rank(cells: list[Config]) -> tuple[float, float]:
        ends = [results[cell]["final"] for cell in cells]
        metric = mean(end["validation_metric"] for end in ends)
        return task.rank(metric, mean(end["validation_loss"] for end in ends))

    return max((cells for cells in groups if len(cells) == most), key=rank)
