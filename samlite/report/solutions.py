"""The space of solutions: how far apart the interpolating minima of a sweep are, and from where they started.

Of the runs of each group that interpolate: the spread over seeds of the test metric and of the sharpness, the distance
of the weights from their first values, and the distance between SAM's solution and that of its base optimizer, from the
same first weights. Distances are Euclidean over all parameters that are trained.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import stdev
from typing import Any

import torch
from torch import Tensor, nn

from samlite import tasks
from samlite.intervals import Interval
from samlite.report.groups import Group, document, groups
from samlite.tasks import Splits
from samlite.training import network
from samlite.training.config import Config, task_of
from samlite.training.measurements import sharpness
from samlite.training.options import OPTIMIZER_OPTIONS
from samlite.training.runs import final_network, read_result
from samlite.training.sparsity import masks_in


@dataclass(frozen=True)
class Solutions:
    """Of the interpolating runs of a group."""

    group: Group
    parameters: int
    runs: int
    interpolating: int
    metric: Interval | None  # test
    metric_spread: float | None  # standard deviation over seeds; None for fewer than two
    sharpness_spread: float | None  # standard deviation of ln(λ_max)
    travelled: Interval | None  # from the first weights
    relative: Interval | None  # the same over the norm of the first weights
    apart: Interval | None  # of SAM: from the base optimizer's solution of the same seed, where that interpolates too

    def to_json(self) -> dict[str, Any]:
        return document(self)


def solutions(folder: Path | str) -> list[Solutions]:
    """Of every group of a sweep's finished runs. Raises UsageError where there are none."""
    folder = Path(folder)
    grouped = groups(folder)
    needed = ("interpolates", "parameters", "final.test_metric")
    results = {cell: read_result(folder / cell.name, *needed) for cells in grouped.values() for cell in cells}
    inside = {cell for cell, result in results.items() if result["interpolates"]}
    one = next(iter(results))
    data = task_of(one).splits(one.data, one.seed)  # only its sizes matter, which no seed changes
    # No more than the solutions of a group and those of its base are in memory.
    return [
        _solutions(group, cells, [cell for cell in inside if _shares(group, cells[0], cell)], results, folder, data)
        for group, cells in grouped.items()
    ]


def _shares(group: Group, sam: Config, other: Config) -> bool:
    """Whether the other run is of the base optimizer and differs by that and its seed alone."""
    own = {name: getattr(sam, name) for name in ("seed", *OPTIMIZER_OPTIONS)}
    return group.rho is not None and other.optimizer == sam.base and replace(other, **own) == sam


def _solutions(
    group: Group,
    cells: list[Config],
    base: list[Config],
    results: dict[Config, dict[str, Any]],
    folder: Path,
    data: Splits,
) -> Solutions:
    inside = [cell for cell in cells if results[cell]["interpolates"]]
    metrics = [results[cell]["final"]["test_metric"] for cell in inside]
    sharp = [math.log(a) for cell in inside if (a := sharpness(folder / cell.name)) is not None and a > 0]
    of_seed, task = {cell.seed: cell for cell in base}, tasks.get(cells[0].task)
    moved, shares, apart = [], [], []
    for cell in inside:
        final = _final(cell, folder, data)
        weights, first = _flat(final), _flat(network.initial(task, cell, data, masks_in(final.state_dict())))
        moved.append(float(torch.dist(weights, first)))
        shares.append(moved[-1] / float(first.norm()))
        if cell.seed in of_seed:
            other = _flat(_final(of_seed[cell.seed], folder, data))
            if len(other) == len(weights):  # SNIP may choose other masks on another machine
                apart.append(float(torch.dist(weights, other)))
    return Solutions(
        group,
        results[cells[0]]["parameters"],
        len(cells),
        len(inside),
        Interval.of(metrics),
        _spread(metrics),
        _spread(sharp),
        Interval.of(moved),
        Interval.of(shares),
        Interval.of(apart),
    )


def _final(cell: Config, folder: Path, data: Splits) -> nn.Module:
    return final_network(tasks.get(cell.task), cell, data, folder / cell.name)


def _flat(model: nn.Module) -> Tensor:
    """The parameters in float64: (p,)."""
    return torch.cat([p.detach().flatten().double() for p in model.parameters()])


def _spread(values: Iterable[float]) -> float | None:
    sample = list(values)
    return stdev(sample) if len(sample) > 1 else None
