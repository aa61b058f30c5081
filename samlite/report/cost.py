"""Optimizers at equal cost: the validation metric of every run after the same number of gradient evaluations.

SAM takes two gradients a step and AgnosticSAM four, so at equal epochs they have cost more than their baseline. At
each width the budget is what the cheapest optimizer took in all, on average over seeds. A learning rate that falls by
the epoch has not fallen yet in a run that goes on after that: compare with ``--schedule constant``, or with a sweep of
fewer epochs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

from samlite import tasks
from samlite.intervals import Interval, paired
from samlite.report.canvas import REFERENCE, colors, panels_by_place
from samlite.report.groups import Group, group_table, groups
from samlite.report.table import Table, interval
from samlite.tasks.metrics import percent, spelled
from samlite.training.runs import read_records, read_result

RECORDED = ("gradient_evaluations", "validation_metric")


@dataclass(frozen=True)
class Cost:
    """What the runs of a group cost, and what they reached."""

    group: Group
    parameters: int
    metric: str
    higher_is_better: bool
    budget: int  # gradient evaluations, the same at every optimizer of a width and condition
    at_budget: Interval | None  # validation metric after the last epoch within the budget
    epochs: float  # mean number of epochs within the budget
    scores: dict[int, float]  # validation metric at the budget, by seed
    gradients: int  # of a whole run
    at_end: Interval | None  # validation metric after all epochs
    curve: list[tuple[int, float]]  # (gradient evaluations, mean validation metric over seeds) by epoch


def costs(folder: Path | str) -> list[Cost]:
    """The cost of every group of a sweep's finished runs. Raises UsageError where there are none."""
    folder = Path(folder)
    grouped = groups(folder)
    runs = {group: [read_records(folder / cell.name, *RECORDED) for cell in cells] for group, cells in grouped.items()}
    spent = {group: mean(run[-1]["gradient_evaluations"] for run in each) for group, each in runs.items()}
    results = []
    for group, cells in grouped.items():
        alike = [other for other in grouped if (other.condition, other.width) == (group.condition, group.width)]
        budget = round(min(spent[other] for other in alike))
        parameters = read_result(folder / cells[0].name, "parameters")["parameters"]
        by_seed = {cell.seed: run for cell, run in zip(cells, runs[group], strict=True)}
        results.append(_cost(group, parameters, tasks.get(cells[0].task), budget, by_seed))
    return results


def _cost(group: Group, parameters: int, task: tasks.Task, budget: int, runs: dict[int, list[dict[str, Any]]]) -> Cost:
    within = {
        seed: [record["validation_metric"] for record in run if record["gradient_evaluations"] <= budget]
        for seed, run in runs.items()
    }
    scores = {seed: metrics[-1] for seed, metrics in within.items() if metrics}
    epochs = zip(*runs.values(), strict=False)  # of all seeds, as far as the shortest run
    return Cost(
        group=group,
        parameters=parameters,
        metric=task.metric,
        higher_is_better=task.higher_is_better,
        budget=budget,
        at_budget=Interval.of(scores.values()),
        epochs=sum(map(len, within.values())) / len(runs),
        scores=scores,
        gradients=max(run[-1]["gradient_evaluations"] for run in runs.values()),
        at_end=Interval.of(run[-1]["validation_metric"] for run in runs.values()),
        curve=[(round(_mean(records, RECORDED[0])), _mean(records, RECORDED[1])) for records in epochs],
    )


def _mean(records: Sequence[dict[str, Any]], name: str) -> float:
    return float(sum(record[name] for record in records) / len(records))


def tables(results: Sequence[Cost]) -> list[Table]:
    """Every optimizer after the same number of gradient evaluations, and after all its epochs."""
    scale = percent(results[0].metric)
    return [
        group_table(
            f"validation {spelled(results[0].metric)} at equal cost",
            results,
            (">budget", ">epochs", ">at budget", ">in all", ">at the end"),
            lambda each: [
                f"{each.budget:,}",
                f"{each.epochs:.3g}",
                interval(each.at_budget, scale),
                f"{each.gradients:,}",
                interval(each.at_end, scale),
            ],
            "Budget and in all: gradient evaluations of a batch. ±: 95 % Student-t over seeds.",
        )
    ]


def verdict(results: Sequence[Cost]) -> str:
    """Which optimizers are better than another at equal cost: by the paired differences over seeds."""
    said = []
    for one, other in combinations(results, 2):
        same_place = (one.group.condition, one.group.width) == (other.group.condition, other.group.width)
        difference = paired(one.scores, other.scores)
        if not same_place or difference is None or not (difference.positive or difference.negative):
            continue
        better, worse = (one, other) if difference.positive == one.higher_is_better else (other, one)
        said.append(f"{better.group.label} is better than {worse.group.method} at width {one.group.width}")
    return f"at equal cost {'; '.join(said) or 'no two optimizers differ significantly'}"


def draw(results: Sequence[Cost], path: Path | str) -> None:
    """A panel a width and condition: the mean over seeds of each group, and the budget at which all are compared."""
    scale = percent(results[0].metric)
    color = colors([each.group.label for each in results])
    with panels_by_place(path, results, "Optimizers by their cost (dashed: equal)") as places:
        for panel, here in places:
            for each in here:
                gradients, metrics = zip(*each.curve, strict=True)
                heights = [scale * value for value in metrics]
                panel.plot(gradients, heights, color=color[each.group.label], label=each.group.label)
            panel.axvline(here[0].budget, **REFERENCE)
            panel.set_xlabel("gradient evaluations")
            panel.legend()
        places[0][0].set_ylabel(f"validation {spelled(results[0].metric)}")
