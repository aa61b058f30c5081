from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats
from sweeps import Sweep

from samlite.report.outcomes import summarize
from samlite.report.verdicts import benefit, no_benefit, variants


def add(sweep: Sweep, width: int, gains: Sequence[float], optimizer: str = "sam", base: float = 0.5) -> None:
    """A baseline whose metric differs by seed far more than the gains of an optimizer over it."""
    for seed, gain in enumerate(gains):
        metric = base + 0.1 * seed
        if optimizer == "sam":
            sweep.add(metric, optimizer="sgd", width=width, seed=seed)
        sweep.add(metric + gain, optimizer=optimizer, width=width, seed=seed)


@pytest.mark.parametrize(
    ("small", "large", "sentence"),
    [
        ([0.00, 0.01, 0.02], [0.04, 0.05, 0.06], "it grows, and this agrees"),
        ([0.04, 0.05, 0.06], [0.04, 0.05, 0.065], "could have been seen: this agrees in part"),
        ([-0.06, -0.05, -0.07], [-0.01, 0.00, -0.02], "so this agrees in trend alone"),
        ([-0.01, 0.01, 0.0], [-0.02, 0.02, 0.0], "could have been seen: this neither shows nor excludes it"),
        ([0.04, 0.05, 0.06], [-0.05, -0.06, -0.04], "SAM is better at width 8 and worse at width 32"),
        ([0.04, 0.05, 0.06], [-0.05, -0.06, -0.04], "it falls, so this disagrees"),
        ([0.01], [0.05], "no significant difference at any width; too few seeds to judge"),
    ],
)
def test_the_benefit_is_judged_by_its_slope_over_widths(
    sweep: Sweep, small: list[float], large: list[float], sentence: str
) -> None:
    add(sweep, 8, small)
    add(sweep, 32, large)
    assert sentence in benefit(summarize(sweep.folder))


def test_growth_is_that_of_a_paired_t_test_which_sees_what_two_separate_intervals_hide(sweep: Sweep) -> None:
    """The gains of a seed move together: each width's interval is wide, and that of the slope is narrow."""
    small = np.array([0.01, 0.05, 0.09, 0.03])
    large = small + np.array([0.010, 0.012, 0.011, 0.009])
    add(sweep, 8, small.tolist(), base=0.2)
    add(sweep, 32, large.tolist(), base=0.2)
    report = summarize(sweep.folder)
    halves = [row.optimizers["sam"].improvement.half_width or 0 for row in report.rows]  # type: ignore[union-attr]
    assert np.hypot(*halves) > (large - small).mean()  # as intervals of independent seeds they overlap
    assert stats.ttest_rel(large, small).pvalue < 0.05
    assert "this agrees" in benefit(report) and "in part" not in benefit(report)


def test_a_verdict_of_no_difference_says_what_could_have_been_seen(sweep: Sweep) -> None:
    add(sweep, 8, [-0.01, 0.01, 0.0])
    add(sweep, 32, [-0.02, 0.02, 0.0])
    halves = [row.optimizers["sam"].improvement.half_width for row in summarize(sweep.folder).rows]
    text = benefit(summarize(sweep.folder))
    assert f"where {100 * halves[0]:.1f} to {100 * halves[1]:.1f} points could have been seen" in text


def test_each_condition_is_judged_by_itself(sweep: Sweep) -> None:
    for noise, gain in ((0.0, 0.0), (0.5, 0.05)):
        for width in (8, 32):
            for seed in range(3):
                sweep.add(0.5, optimizer="sgd", width=width, seed=seed, label_noise=noise)
                metric = 0.5 + gain + 0.01 * (seed - 1)
                sweep.add(metric, optimizer="sam", width=width, seed=seed, label_noise=noise)
    text = benefit(summarize(sweep.folder))
    assert "label noise 0: SAM makes no significant difference" in text
    assert "Label noise 0.5: SAM is better at width 8, 32" in text


def test_quantities_of_minima_are_counted_by_their_verdicts(sweep: Sweep) -> None:
    for width, ratio in ((8, 1.0), (32, 0.1)):
        for seed in range(3):
            for name, factor in (("sgd", 1.0), ("sam", ratio)):
                sharpness = factor * (1 + 0.1 * ((seed + (name == "sam")) % 3))
                sweep.add(0.5, optimizer=name, width=width, seed=seed, sharpness=sharpness, spread={"2": 2 / factor})
    text = benefit(summarize(sweep.folder))
    assert "Significantly smaller at SAM's minima: a in 1 of 2 places" in text
    assert "s_2 in 0 of 2 places (larger in 1)" in text


def test_a_claim_of_no_benefit_holds_until_sam_is_better_somewhere(sweep: Sweep) -> None:
    add(sweep, 8, [-0.01, 0.01, 0.0])
    assert no_benefit(summarize(sweep.folder)) == "SAM is better at no width: this agrees"
    add(sweep, 32, [0.05, 0.05, 0.06])
    assert no_benefit(summarize(sweep.folder)) == "SAM is better at some width: this disagrees"


def test_variants_are_compared_with_sam_in_pairs_of_seeds(sweep: Sweep) -> None:
    add(sweep, 8, [0.01, 0.05, 0.09])
    add(sweep, 8, [0.02, 0.06, 0.101], optimizer="friendly")  # a little better at every seed
    add(sweep, 8, [0.0, 0.06, 0.09], optimizer="sampa")
    text = variants(summarize(sweep.folder))
    assert text.endswith("friendly beat SAM")
    assert "none beat the base significantly" in text
