"""Statuses of claims, from results made up."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats
from sweeps import Sweep

from samlite.report import findings
from samlite.report.convergence import before_the_floor, fit
from samlite.report.outcomes import Report, summarize


def made(sweep: Sweep, gains: dict[int, Sequence[float]], ratios: dict[int, float] | None = None) -> Report:
    """A sweep of digits with these gains of SAM by width, and these ratios of a."""
    for width, values in gains.items():
        for seed, gain in enumerate(values):
            a = (ratios or {}).get(width, 1.0) * (1 + 0.01 * seed)
            sweep.add(0.5, optimizer="sgd", width=width, seed=seed, sharpness=1.0)
            sweep.add(0.5 + gain, optimizer="sam", width=width, seed=seed, sharpness=a)
    return summarize(sweep.folder)


ABOVE, ZERO, BELOW = (0.03, 0.031, 0.032), (-0.001, 0.0, 0.001), (-0.032, -0.031, -0.03)


@pytest.mark.parametrize(
    ("small", "large", "growth", "absence"),
    [
        (ZERO, ABOVE, "supported", "mixed"),
        (ABOVE, ABOVE, "not seen", "refuted"),  # there is a benefit, which does not grow
        (ZERO, ZERO, "not seen", "supported"),
        (BELOW, ZERO, "in trend", "supported"),
        (ABOVE, BELOW, "refuted", "mixed"),
        ((*ABOVE[:2], 0.09), (0.02, 0.021, 0.025), "not seen", "mixed"),
        ((0.01,), (0.05,), "not seen", "not seen"),  # one seed shows nothing
    ],
)
def test_growth_and_absence(
    sweep: Sweep, small: Sequence[float], large: Sequence[float], growth: str, absence: str
) -> None:
    report = made(sweep, {8: small, 64: large})
    assert findings.growth(report).status == growth
    assert findings.no_benefit(report).status == absence


def test_growth_is_that_of_sam_and_not_of_another_variant(sweep: Sweep) -> None:
    for width, gain in ((8, 0.0), (64, 0.03)):
        for seed in range(3):
            for optimizer, metric in (("sgd", 0.5), ("friendly", 0.5 - gain), ("sam", 0.5 + gain + 0.001 * seed)):
                sweep.add(metric, optimizer=optimizer, width=width, seed=seed)
    assert findings.growth(summarize(sweep.folder)).status == "supported"


def test_the_numbers_of_a_finding_say_what_could_have_been_seen(sweep: Sweep) -> None:
    report = made(sweep, {8: ZERO, 64: ZERO})
    assert findings.growth(report).numbers.endswith("points per tenfold parameters; +0.00 ± 0.25 points at width 64")
    one = Report(**{**vars(report), "rows": report.rows[:1]})
    assert findings.growth(one).numbers == "+0.00 ± 0.25 points at width 8"


@pytest.mark.parametrize(
    ("ratios", "flatter", "with_width"),
    [
        ({8: 0.9, 64: 0.3}, "supported", "supported"),
        ({8: 1.0, 64: 0.3}, "in trend", "supported"),
        ({8: 0.3, 64: 0.9}, "supported", "refuted"),
        ({8: 2.0, 64: 2.0}, "refuted", "not seen"),
        ({8: 2.0, 64: 0.5}, "mixed", "supported"),
    ],
)
def test_flatter_minima(sweep: Sweep, ratios: dict[int, float], flatter: str, with_width: str) -> None:
    report = made(sweep, {8: ZERO, 64: ZERO}, ratios)
    assert findings.flatter(report).status == flatter
    if with_width != "not seen":  # equal ratios leave a slope of rounding
        assert findings.flatter_with_width(report).status == with_width
    assert findings.more_uniform(report).status == "not seen"  # which was not measured


@pytest.mark.parametrize(("start", "stronger"), [(0.0, "supported"), (-0.1, "mixed")])  # as a whole it may be lower
def test_a_condition_strengthens_the_benefit_by_its_slope_and_at_the_largest_width(
    sweep: Sweep, start: float, stronger: str
) -> None:
    for noise, first, rise in ((0.0, 0.0, 0.01), (0.5, start, 0.04)):
        for width in (8, 64):
            for seed in range(3):
                choices = {"width": width, "seed": seed, "label_noise": noise}
                gain = first + rise * math.log10(width) + 0.0001 * (seed * width * noise)
                sweep.add(0.5, optimizer="sgd", **choices)
                sweep.add(0.5 + gain, optimizer="sam", **choices)
    report = summarize(sweep.folder)
    found = findings.stronger(report)
    assert found.status == stronger and findings.steeper(report).status == "supported"
    assert found.numbers.startswith("label noise 0.5: slope +3.") and "at the largest width" in found.numbers
    assert findings.growth(report).numbers.startswith("label noise 0: +1.000 ")
    assert findings.last_growth(report).numbers.startswith("label noise 0.5: +4.")


def test_the_fit_of_convergence_ends_at_the_floor() -> None:
    losses = [math.exp(-0.1 * step) + 1e-4 for step in range(200)]
    fitted = before_the_floor(losses)
    assert losses[fitted - 1] > 3e-4 >= losses[fitted]
    rate, r2 = fit(range(fitted), losses[:fitted]) or (0, 0)
    whole = fit(range(200), losses) or (0, 0)
    assert rate == pytest.approx(0.1, rel=0.03) and r2 > 0.999 > whole[1]
    assert before_the_floor([1.0] * 50) == 50 and before_the_floor([1.0, 0.1]) == 2


@pytest.mark.parametrize(
    ("sam", "sgd", "status"),
    [
        ((1.0, {"2": 1.0, "3": 9.0, "4": 9.0}), (100.0, {"2": 1.0, "3": 9.0, "4": 9.0}), "supported"),
        ((1.0, {"2": 1.0, "3": 9.0, "4": 9.0}), (1.0, {"2": 1.0, "3": 9.0, "4": 9.0}), "not seen"),
        ((1.0, {"2": 1.0, "3": 11.0, "4": 9.0}), (1.0, {"2": 1.0, "3": 9.0, "4": 9.0}), "not seen"),
        ((1.0, {"2": 1.0, "3": 9.0, "4": 9.0}), (1.0, {"2": 1.0, "3": 9.0, "4": 11.0}), "supported"),
    ],
)
def test_bounds_of_stability(sweep: Sweep, sam: tuple[float, object], sgd: tuple[float, object], status: str) -> None:
    """lr 0.05 and rho 0.2: a <= 14, s_3 <= 10 and s_4 <= 10, and none for s_2."""
    sweep.add(0.9, optimizer="sgd", lr=0.05, sharpness=sgd[0], spread=sgd[1])
    sweep.add(0.9, optimizer="sam", lr=0.05, rho=0.2, sharpness=sam[0], spread=sam[1])
    assert findings.bounds(sweep.folder).status == status


@pytest.mark.parametrize(
    ("best", "status"),
    [
        ((0.01, 0.02, 0.05, 0.1), "supported"),
        ((0.05, 0.05, 0.05, 0.05), "not seen"),
        ((0.02, 0.1, 0.01, 0.05), "not seen"),
        ((0.1, 0.05, 0.02, 0.01), "refuted"),
        ((0.01, 0.1), "not seen"),
    ],
)
def test_the_best_radius_grows_by_a_slope_over_widths(sweep: Sweep, best: Sequence[float], status: str) -> None:
    for width, chosen in zip((8, 16, 32, 64), best, strict=False):
        for rho in (0.01, 0.02, 0.05, 0.1):
            sweep.add(0.5, optimizer="sam", rho=rho, width=width, validation=0.9 if rho == chosen else 0.5)
    report = summarize(sweep.folder)
    assert findings.best_radius(report).status == status
    if len(best) > 2 and len(set(best)) > 1:
        x = [math.log10(row.parameters) for row in report.rows]
        fitted = stats.linregress(x, np.log10(best))
        significant = fitted.pvalue < 0.05
        assert (status != "not seen") == significant
