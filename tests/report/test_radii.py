"""The search for the best radius, on sweeps with made-up results."""

import math

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


def test_test_metrics_choose_nothing(sweep: Sweep) -> None:
    """Whatever the test metrics are, the same radii are chosen and tried."""
    for rho, test in zip(START, (0.99, 0.1, 0.5, 0.2, 0.98), strict=True):
        sweep.add(test, optimizer="sam", rho=rho, validation=validation(rho, 0.05))
    report = summarize(sweep.folder)
    assert report.rows[0].optimizers["sam"].rho == 0.05
    assert not beyond(report, read_cells(sweep.folder))
