"""The space of solutions: how far apart the interpolating minima of a sweep are, and from where they started.

Of the runs of each group that interpolate: the spread over seeds of the test metric and of the sharpness, the distance
of the weights from their first values, and the distance between SAM's solution and that of its base optimizer, from the
same first weights. Distances are Euclidean over all parameters that are trained.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import stdev
from typing import Any

import torch
from torch import Tensor, nn

from samlite import tasks
from samlite.curvature.hessian import Hessian
from samlite.curvature.surfaces import surface
from samlite.errors import UsageError
from samlite.intervals import Interval
from samlite.report.canvas import colors, draw_curve, draw_intervals, label_parameters, new_figure
from samlite.report.groups import Group, group_table, groups
from samlite.report.table import Table, interval, number
from samlite.tasks import Splits
from samlite.training import network
from samlite.training.config import Config, task_of
from samlite.training.measurements import sharpness
from samlite.training.options import OPTIMIZER_OPTIONS
from samlite.training.runs import final_network, load_data, read_result
from samlite.training.sparsity import masks_in

BARRIER_POINTS, BARRIER_SAMPLES = 31, 1024  # along a line from -0.25 to 1.25, of training samples


@dataclass(frozen=True)
class Solutions:
    """The solutions that the interpolating runs of a group found."""

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
    barrier: Interval | None  # the rise of the training loss on the straight line between both


def solutions(folder: Path | str) -> list[Solutions]:
    """The solutions of every group of a sweep's finished runs. Raises UsageError where there are none."""
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
    base_of_seed, task = {cell.seed: cell for cell in base}, tasks.get(cells[0].task)
    moved, shares, apart, barriers = [], [], [], []
    for cell in inside:
        final = _final(cell, folder, data)
        weights, first = _flat(final), _flat(network.initial(task, cell, data, masks_in(final.state_dict())))
        moved.append(float(torch.dist(weights, first)))
        shares.append(moved[-1] / float(first.norm()))
        if cell.seed in base_of_seed:
            base_network = _final(base_of_seed[cell.seed], folder, data)
            other = _flat(base_network)
            if len(other) == len(weights):  # SNIP may choose other masks on another machine
                apart.append(float(torch.dist(weights, other)))
                barriers += _barrier(final, base_network, cell, folder)
    return Solutions(
        group=group,
        parameters=results[cells[0]]["parameters"],
        runs=len(cells),
        interpolating=len(inside),
        metric=Interval.of(metrics),
        metric_spread=_spread(metrics),
        sharpness_spread=_spread(sharp),
        travelled=Interval.of(moved),
        relative=Interval.of(shares),
        apart=Interval.of(apart),
        barrier=Interval.of(barriers),
    )


def _barrier(sam: nn.Module, base: nn.Module, cell: Config, folder: Path) -> list[float]:
    """The barrier between two networks on at most 1,024 training samples; nothing for the same weights."""
    task = task_of(cell)
    samples, _ = task.subsample(sam, load_data(task, cell, folder / cell.name).train, BARRIER_SAMPLES, cell.seed)
    try:
        found = surface(Hessian(sam, task.loss, samples), base, points=BARRIER_POINTS)
    except UsageError:
        return []
    return [] if found.barrier is None else [found.barrier]


def _final(cell: Config, folder: Path, data: Splits) -> nn.Module:
    return final_network(tasks.get(cell.task), cell, data, folder / cell.name)


def _flat(model: nn.Module) -> Tensor:
    """The parameters in float64: (p,)."""
    return torch.cat([p.detach().flatten().double() for p in model.parameters()])


def _spread(values: Iterable[float]) -> float | None:
    sample = list(values)
    return stdev(sample) if len(sample) > 1 else None


def tables(results: Sequence[Solutions]) -> list[Table]:
    """How the interpolating solutions spread, how far they travelled, how far apart they are."""
    return [
        group_table(
            "interpolating solutions by width",
            results,
            (">interpolate", ">test metric", ">spread", ">spread of ln a", ">‖w − w₀‖", ">to base", ">barrier"),
            lambda each: [
                f"{each.interpolating} of {each.runs}",
                interval(each.metric),
                number(each.metric_spread),
                number(each.sharpness_spread),
                interval(each.travelled),
                interval(each.apart),
                interval(each.barrier),
            ],
            "Spread: standard deviation over seeds. ‖w − w₀‖: from the first weights. To base: from SAM's solution to "
            "that of its base optimizer, from the same first weights; barrier: the rise of the training loss on the "
            "straight line between both. ±: 95 % Student-t over seeds.",
        )
    ]


def verdict(results: Sequence[Solutions]) -> str:
    """How many runs interpolate, and how far SAM's solutions are from its base's beside the way from the start."""
    inside, runs = sum(each.interpolating for each in results), sum(each.runs for each in results)
    shares = [
        f"{each.apart.mean / each.travelled.mean:.2g} at width {each.group.width} ({each.group.label})"
        for each in results
        if each.apart and each.travelled and each.travelled.mean > 0
    ]
    text = f"{inside} of {runs} runs interpolate"
    if not shares:
        return text
    return f"{text}; SAM's solution is this far from its base's, over its way from the start: {', '.join(shares)}"


def draw(results: Sequence[Solutions], path: Path | str) -> None:
    """Three panels of the interpolating runs. Raises UsageError where there are none."""
    inside = [each for each in results if each.interpolating]
    if not inside:
        raise UsageError("a figure of solutions needs runs that interpolate; train wider networks, or for longer")
    with new_figure(path, (9.6, 3.4)) as figure:
        travelled, apart, spread = figure.subplots(1, 3)
        for label, color in colors([each.group.label for each in inside]).items():
            here = [each for each in inside if each.group.label == label]
            for panel, name in ((travelled, "travelled"), (apart, "apart")):
                draw_intervals(panel, label, color, [(each.parameters, getattr(each, name)) for each in here])
            spreads = [(each.parameters, each.metric_spread) for each in here if each.metric_spread is not None]
            draw_curve(spread, label, color, spreads, [])
        travelled.set_title("distance from the first weights")
        apart.set_title("from SAM's to its base's solution")
        spread.set_title("spread of the test metric over seeds")
        for panel in (travelled, apart, spread):
            label_parameters(panel, sorted({each.parameters for each in inside}))
        travelled.legend()
        figure.suptitle("Interpolating solutions by width (bands: 95 % intervals)")
