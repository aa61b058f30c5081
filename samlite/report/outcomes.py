"""The outcome of a sweep by width: metrics, SAM's improvement, and the curvature at the minima, with their intervals.

Intervals are Student's t at 95 % over seeds; one seed gives none. The improvement is the final test
metric with SAM less that of its base optimizer, paired by seed, with the sign turned where a lower
metric is better: positive means that SAM is better. Of several rhos the one that is best on validation
counts, chosen for each width and condition. A condition is what the sweep varies beside: label noise,
the number of samples, sparsity, weight decay.

The quantities of a minimum are its sharpness a = λ_max(H) and, where measured, the non-uniformity s_2,
s_3, ... of the samples' Hessians. As they differ by orders of magnitude between runs, SAM is compared
with its base by their ratio: the geometric mean over pairs of seeds, its interval by Student's t on the
logarithms. Each interval holds at 95 % by itself; nothing is corrected for how many there are.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any, TypeVar

from samlite import tasks
from samlite.errors import UsageError
from samlite.intervals import Comparison, Geometric, Interval
from samlite.report.groups import condition_of, varying
from samlite.sweep.grid import read_cells
from samlite.sweep.run import finished
from samlite.training.config import Config
from samlite.training.measurements import nonuniformity, sharpness
from samlite.training.options import FAMILY
from samlite.training.runs import read_result

K = TypeVar("K")
V = TypeVar("V")
NEEDED = (  # of every result
    *("final.test_metric", "final.validation_metric", "final.validation_loss", "best.test_metric"),
    *("interpolates", "parameters"),
)


@dataclass(frozen=True)
class Outcome:
    """One optimizer at one width, over its seeds."""

    metric: Interval  # final test metric
    best: Interval  # test metric at the epoch that is best on validation
    interpolating: int  # how many of the runs interpolate
    rho: float | None  # SAM's, selected on validation
    validation: dict[float, Interval]  # validation metric by the rhos that were tried; empty without SAM
    improvement: Interval | None  # over the base optimizer, for SAM
    gains: dict[int, float]  # the improvement by seed
    sharpness: Interval | None  # largest Hessian eigenvalue
    nonuniformity: dict[str, Interval]  # s_k by its order k
    geometric: dict[str, Geometric]  # of "a" and "s_k"
    comparisons: dict[str, Comparison]  # of "a" and "s_k" with those of the base optimizer, for SAM
    ratios: dict[str, dict[int, float]]  # ln of "a" and "s_k" over those of the base optimizer by seed, for SAM


def is_sam(label: str) -> bool:
    """Whether this is SAM itself, in whatever form: sam-adaptive, but not sampa."""
    return label.split("-")[0] == "sam"


@dataclass(frozen=True)
class Row:
    width: int
    parameters: int  # that are trained: those a mask keeps
    condition: dict[str, float]  # label noise, sparsity and others: those of them that the sweep varies
    optimizers: dict[str, Outcome]

    @property
    def sam(self) -> Outcome | None:
        """That of SAM itself, in whatever form."""
        return next((each for label, each in self.optimizers.items() if is_sam(label)), None)


@dataclass(frozen=True)
class Report:
    """A sweep's rows by condition and growing width, and the names of the runs that are not in them."""

    task: str
    metric: str
    higher_is_better: bool
    rows: tuple[Row, ...]
    unfinished: tuple[str, ...]
    unmeasured: tuple[str, ...]  # without a sharpness that can be trusted
    without_moments: tuple[str, ...]

    @property
    def outcomes(self) -> list[Outcome]:
        """Those of all rows."""
        return [outcome for row in self.rows for outcome in row.optimizers.values()]

    @property
    def conditions(self) -> list[dict[str, float]]:
        """Those of the rows, each once."""
        return [dict(each) for each in dict.fromkeys(tuple(row.condition.items()) for row in self.rows)]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def summarize(folder: Path | str) -> Report:
    """Report on a sweep, finished or not. Raises UsageError where no run is finished."""
    folder = Path(folder)
    cells = read_cells(folder)
    results = {cell: read_result(folder / cell.name, *NEEDED) for cell in cells if finished(folder / cell.name, cell)}
    if not results:
        raise UsageError(f"{folder} must hold a finished run; repeat its sweep")
    task = tasks.get(cells[0].task)
    minima = {cell: quantities(folder / cell.name) for cell in results}
    varied = varying(cells)
    places = {cell: (condition_of(cell, varied), cell.width) for cell in results}
    rows = [
        _row(dict(place[0]), {cell: results[cell] for cell in results if places[cell] == place}, minima, task)
        for place in sorted(set(places.values()))
    ]
    return Report(
        task=task.name,
        metric=task.metric,
        higher_is_better=task.higher_is_better,
        rows=tuple(rows),
        unfinished=tuple(cell.name for cell in cells if cell not in results),
        unmeasured=tuple(cell.name for cell in results if "a" not in minima[cell]),
        without_moments=tuple(cell.name for cell in results if "s_2" not in minima[cell]),
    )


def quantities(folder: Path) -> dict[str, float]:
    """What can be trusted of the measurements of a run: a, and s_k."""
    a = sharpness(folder)
    largest = {} if a is None else {"a": a}
    return largest | {f"s_{k}": s for k, s in (nonuniformity(folder) or {}).items()}


def _row(
    condition: dict[str, float],
    results: dict[Config, dict[str, Any]],
    minima: dict[Config, dict[str, float]],
    task: tasks.Task,
) -> Row:
    by_rho: dict[str, dict[float, list[Config]]] = defaultdict(lambda: defaultdict(list))
    for cell in results:
        by_rho[cell.label][cell.rho].append(cell)
    chosen = {name: _best_on_validation(list(runs.values()), results, task) for name, runs in by_rho.items()}
    optimizers = {
        name: _outcome(cells, by_rho[name], chosen.get(cells[0].base, []), results, minima, task)
        for name, cells in chosen.items()
    }
    return Row(next(iter(results)).width, next(iter(results.values()))["parameters"], condition, optimizers)


def _outcome(
    cells: list[Config],
    by_rho: dict[float, list[Config]],
    base: list[Config],
    results: dict[Config, dict[str, Any]],
    minima: dict[Config, dict[str, float]],
    task: tasks.Task,
) -> Outcome:
    """The outcome of one optimizer's runs, compared with those of its base if it is SAM."""
    final = {cell: results[cell]["final"]["test_metric"] for cell in (*cells, *base)}
    metric = Interval.of(final[cell] for cell in cells)
    best = Interval.of(results[cell]["best"]["test_metric"] for cell in cells)
    assert metric and best  # a group of runs is never empty
    sam = cells[0].optimizer in FAMILY
    base_of_seed = {cell.seed: cell for cell in base}
    pairs = [(cell, base_of_seed[cell.seed]) for cell in cells if cell.seed in base_of_seed] if sam else []
    sign = 1 if task.higher_is_better else -1
    gains = {cell.seed: sign * (final[cell] - final[other]) for cell, other in pairs}
    values: dict[str, list[float]] = defaultdict(list)
    for cell in cells:
        for name, value in minima[cell].items():
            values[name].append(value)
    tried = {
        rho: Interval.of(results[cell]["final"]["validation_metric"] for cell in runs)
        for rho, runs in sorted(by_rho.items())
        if sam
    }
    spread = {name.removeprefix("s_"): Interval.of(sample) for name, sample in sorted(values.items()) if name != "a"}
    return Outcome(
        metric=metric,
        best=best,
        interpolating=sum(results[cell]["interpolates"] for cell in cells),
        rho=cells[0].rho if sam else None,
        validation=_known(tried),
        improvement=Interval.of(gains.values()),
        gains=gains,
        sharpness=Interval.of(values["a"]),
        nonuniformity=_known(spread),
        geometric=_known({name: Geometric.of(sample) for name, sample in sorted(values.items())}),
        comparisons=_known({name: Comparison.of(_both(name, pairs, minima)) for name in sorted(values)}),
        ratios={name: ratios for name in sorted(values) if (ratios := _ratios(name, pairs, minima))},
    )


def _known(values: dict[K, V | None]) -> dict[K, V]:
    return {name: value for name, value in values.items() if value is not None}


def _both(
    name: str, pairs: list[tuple[Config, Config]], minima: dict[Config, dict[str, float]]
) -> Iterator[tuple[float, float]]:
    """The quantity of this name at both ends of each pair that has it there."""
    for one, other in pairs:
        if name in minima[one] and name in minima[other]:
            yield minima[one][name], minima[other][name]


def _ratios(name: str, pairs: list[tuple[Config, Config]], minima: dict[Config, dict[str, float]]) -> dict[int, float]:
    """ln of the quantity's ratio by seed, where both are positive."""
    found = {}
    for one, other in pairs:
        both = minima[one].get(name, 0.0), minima[other].get(name, 0.0)
        if min(both) > 0:
            found[one.seed] = math.log(both[0] / both[1])
    return found


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
