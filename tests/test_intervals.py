import numpy as np
import pytest
from scipy import stats

from samlite.intervals import Comparison, Geometric, Interval, paired, student_t


def test_quantiles_of_student_t_are_those_of_scipy() -> None:
    for degrees in [*range(1, 40), 100, 1001]:
        assert student_t(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-12)
    assert student_t(5, 0.99) == pytest.approx(stats.t.ppf(0.995, 5), rel=1e-12)


def test_an_interval_is_student_t_at_95_percent() -> None:
    values = np.random.default_rng(0).normal(size=7)
    interval = Interval.of(values.tolist())
    low, high = stats.t.interval(0.95, 6, loc=values.mean(), scale=stats.sem(values))
    assert interval is not None and interval.half_width is not None and interval.n == 7
    assert interval.mean - interval.half_width == pytest.approx(low, rel=1e-12)
    assert interval.mean + interval.half_width == pytest.approx(high, rel=1e-12)


def test_one_value_has_no_interval_and_none_has_no_mean() -> None:
    assert Interval.of([3.0]) == Interval(3.0, None, 1)
    assert Interval.of([]) is None


def test_a_geometric_mean_and_its_interval_are_those_of_scipy() -> None:
    values = np.exp(np.random.default_rng(0).normal(-2, 3, size=6))
    found = Geometric.of(values.tolist())
    low, high = stats.t.interval(0.95, 5, loc=np.log(values).mean(), scale=stats.sem(np.log(values)))
    assert found is not None and found.n == 6 and found.zeros == 0
    assert found.mean == pytest.approx(stats.gmean(values), rel=1e-12)
    assert (found.low, found.high) == (pytest.approx(np.exp(low), rel=1e-12), pytest.approx(np.exp(high), rel=1e-12))


def test_a_geometric_mean_has_no_interval_for_one_seed_and_none_at_all_where_a_value_is_zero() -> None:
    assert Geometric.of([]) is None
    assert Geometric.of([4.0]) == Geometric(pytest.approx(4.0), None, None, 1, 0)
    assert Geometric.of([1.0, 0.0, 2.0]) == Geometric(None, None, None, 3, 1)
    assert Comparison.of([]) is None
    for pair in ((0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (-1.0, -2.0)):
        assert Comparison.of([pair, (1.0, 2.0)]) == Comparison(Geometric(None, None, None, 2, 1), None)


def test_intervals_beyond_the_range_of_a_float_stay_numbers() -> None:
    found = Geometric.of([1e-300, 1e300])
    assert found is not None and found.low == 0 and found.high is not None and np.isfinite(found.high)


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([0.2, 0.3, 0.25], "smaller"),
        ([4.0, 3.0, 5.0], "larger"),
        ([0.2, 0.3, 5.0], "no significant difference"),
        ([1.0, 1.0, 1.0], "no significant difference"),
        ([0.01], None),
    ],
)
def test_the_verdict_is_that_of_a_t_test_on_the_log_ratios(ratios: list[float], verdict: str | None) -> None:
    found = Comparison.of([(3 * ratio, 3.0) for ratio in ratios])
    assert found is not None and found.verdict == verdict
    if len(set(ratios)) > 1:
        p = stats.ttest_1samp(np.log(ratios), 0).pvalue
        assert (p < 0.05) == (verdict != "no significant difference")


def test_a_paired_difference_is_that_of_a_paired_t_test_over_the_seeds_that_both_have() -> None:
    generator = np.random.default_rng(4)
    one, other = generator.normal(0.2, 1, size=(2, 9))
    difference = paired(dict(enumerate(one.tolist())), dict(enumerate(other[:8].tolist())))
    test = stats.ttest_rel(one[:8], other[:8])
    low, high = test.confidence_interval(0.95)
    assert difference is not None and difference.half_width is not None and difference.n == 8
    assert difference.mean - difference.half_width == pytest.approx(low, rel=1e-12)
    assert difference.mean + difference.half_width == pytest.approx(high, rel=1e-12)
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_an_interval_is_positive_or_negative_only_where_zero_is_outside_and_never_for_one_seed() -> None:
    assert Interval(1.0, 0.9, 3).positive and not Interval(1.0, 0.9, 3).negative
    assert Interval(-1.0, 0.9, 3).negative and not Interval(-1.0, 0.9, 3).positive
    for undecided in (Interval(1.0, 1.1, 3), Interval(-1.0, 1.0, 3), Interval(5.0, None, 1), Interval(-5.0, None, 1)):
        assert not undecided.positive and not undecided.negative
