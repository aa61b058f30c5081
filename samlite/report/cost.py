"""Optimizers at equal cost: the validation metric of every run after the same number of gradient evaluations.

SAM takes two gradients a step and AgnosticSAM four, so at equal epochs they have cost more than their baseline. At
each width the budget is what the cheapest optimizer took in all, on average over seeds. A learning rate that falls by
the epoch has not fallen yet in a run that goes on after that: compare with ``--schedule constant``, or with a sweep of
fewer epochs.
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from samlite import tasks
from samlite.intervals import Interval
from samlite.report.groups import Group, document, groups
from samlite.training.runs import read_records, read_result

RECORDED = ("gradient_evaluations", "validation_metric")


@dataclass(frozen=True)
class Cost:
    """Of the runs of a group."""

    group: Group
    parameters: int
    metric: str
    budget: int  # gradient evaluations, the same at every optimizer of a width and condition
    at_budget: Interval | None  # validation metric after the last epoch within the budget
    epochs: float  # up to there, on average
    gradients: int  # of a whole run
    at_end: Interval | None  # validation metric after all epochs
    curve: list[tuple[int, float]]  # (gradient evaluations, mean validation metric over seeds) by epoch

    def to_json(self) -> dict[str, Any]:
        return document(self)


def costs(folder: Path | str) -> list[Cost]:
    """Of every group of a sweep's finished runs. Raises UsageError where there are none."""
    folder = Path(folder)
    grouped = groups(folder)
    runs = {group: [read_records(folder / cell.name, *RECORDED) for cell in cells] for group, cells in grouped.items()}
    spent = {group: mean(run[-1]["gradient_evaluations"] for run in each) for group, each in runs.items()}
    found = []
    for group, cells in grouped.items():
        alike = [other for other in grouped if (other.condition, other.width) == (group.condition, group.width)]
        budget = round(min(spent[other] for other in alike))
        result = read_result(folder / cells[0].name, "parameters")
        found.append(_cost(group, result["parameters"], tasks.get(cells[0].task).metric, budget, runs[group]))
    return found


def _cost(group: Group, parameters: int, metric: str, budget: int, runs: list[list[dict[str, Any]]]) -> Cost:
    within = [[record for record in run if record["gradient_evaluations"] <= budget] for run in runs]
    reached = [run[-1] for run in within if run]
    shortest = min(map(len, runs))
    return Cost(
        group,
        parameters,
        metric,
        budget,
        Interval.of(record["validation_metric"] for record in reached),
        sum(map(len, within)) / len(runs),
        max(run[-1]["gradient_evaluations"] for run in runs),
        Interval.of(run[-1]["validation_metric"] for run in runs),
        [
            (
                round(sum(run[i]["gradient_evaluations"] for run in runs) / len(runs)),
                sum(run[i]["validation_metric"] for run in runs) / len(runs),
            )
            for i in range(shortest)
        ],
    )
