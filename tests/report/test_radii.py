"""The search for the best radius, on sweeps with made-up results."""

import math
import random

import pytest
from sweeps import Sweep

from samlite.report import by_width
from samlite.report.outcomes import summarize
from samlite.report.radii import START, beyond
from samlite.sweep.grid import read_cells


def validation(rho: float, best: float) -> float:
    return 0.9 - 0.05 * abs(math.log(rho / best))


@pytest.mark.parametrize(("best", "tried"), [(0.05, []), (0.8, [0.5, 1.0, 2.0]), (0.003, [0.005, 0.002, 0.001])])
def test_radii_are_tried_past_an_end_until_the_best_is_inside(sweep: Sweep, best: float, tried: list[float]) -> None:
    for seed in range(2):
        sweep.add(0.5, optimizer="sgd", seed=seed)
        for rho in START:
            sweep.add(0.5, optimizer="sam", rho=rho, seed=seed, validation=validation(rho, best))
    found = []
    while more := beyond(summarize(sweep.folder), read_cells(sweep.folder)):
        assert len(more) == 2 and {cell.seed for cell in more} == {0, 1}
        found.append(more[0].rho)
        for cell in more:
            sweep.add(0.5, optimizer="sam", rho=cell.rho, seed=cell.seed, validation=validation(cell.rho, best))
    assert found == tried
    (outcome,) = [row.optimizers["sam"] for row in summarize(sweep.folder).rows]
    assert outcome.rho not in (min(outcome.validation), max(outcome.validation))


def test_each_width_and_condition_is_searched_by_itself_and_the_table_says_where_an_end_is_best(sweep: Sweep) -> None:
    for width, noise, best in ((8, 0.0, 0.05), (8, 0.5, 0.2), (32, 0.0, 0.01), (32, 0.5, 0.05)):
        for rho in START:
            sweep.add(0.5, optimizer="sam", rho=rho, width=width, label_noise=noise, validation=validation(rho, best))
    report = summarize(sweep.folder)
    more = beyond(report, read_cells(sweep.folder))
    assert [(cell.width, cell.label_noise, cell.rho) for cell in more] == [(32, 0.0, 0.005), (8, 0.5, 0.5)]
    notes = " ".join(by_width.tables(report)[0].notes)
    assert "at an end of those tried: 0.01 at width 32, label noise 0; 0.2 at width 8, label noise 0.5" in notes


@pytest.mark.parametrize("shuffle", range(5))
def test_test_metrics_choose_nothing(sweep: Sweep, shuffle: int) -> None:
    """However the test metrics of a sweep are dealt out to its runs, the same radii are chosen and tried."""
    places = [
        (width, noise, seed, rho) for width in (8, 32) for noise in (0.0, 0.5) for seed in (0, 1) for rho in START
    ]
    tests = [0.01 * i for i in range(len(places))]
    random.Random(shuffle).shuffle(tests)
    best = {(8, 0.0): 0.05, (8, 0.5): 0.02, (32, 0.0): 0.1, (32, 0.5): 0.2}
    for (width, noise, seed, rho), test in zip(places, tests, strict=True):
        choices = {"width": width, "label_noise": noise, "seed": seed, "rho": rho}
        sweep.add(test, optimizer="sam", best=test, validation=validation(rho, best[width, noise]), **choices)
    report = summarize(sweep.folder)
    chosen = {(row.width, row.condition["label_noise"]): row.optimizers["sam"].rho for row in report.rows}
    assert chosen == best
    assert {(cell.width, cell.label_noise, cell.rho) for cell in beyond(report, read_cells(sweep.folder))} == {
        (32, 0.5, 0.5)
    }
