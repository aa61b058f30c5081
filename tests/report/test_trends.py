"""Slopes against log10(parameters): their values, their power, and how often they are wrong."""

import math

import numpy as np
import pytest
from scipy import stats
from sweeps import Sweep

from samlite.intervals import Interval
from samlite.report.outcomes import summarize
from samlite.report.trends import slopes, trends
from samlite.report.verdicts import benefit


def test_a_slope_is_that_of_a_line_through_the_values_of_a_seed() -> None:
    x = [4.0, 4.5, 5.2]
    y = {seed: [0.1 * seed + 0.3 * a + 0.01 * (seed + 1) * math.sin(9 * a) for a in x] for seed in range(3)}
    found = slopes({a: {seed: values[i] for seed, values in y.items()} for i, a in enumerate(x)})
    for seed, values in y.items():
        assert found[seed] == pytest.approx(stats.linregress(x, values).slope)
    assert slopes({4.0: {0: 1.0}}) == {}
    assert list(slopes({4.0: {0: 1.0, 1: 2.0}, 5.0: {0: 2.0}})) == [0]  # a seed needs every width


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_without_a_trend_growth_is_seen_in_one_of_forty_draws_and_the_interval_covers(seeds: int) -> None:
    generator = np.random.default_rng(seeds)
    widths, grows, covers, draws, true = np.linspace(4, 5, 5), 0, 0, 2000, 0.02
    for _ in range(draws):
        of_seed = generator.normal(0, 0.1, seeds)  # what a seed shares over its widths
        noise = generator.normal(0, 0.02, (len(widths), seeds))
        values = {x: dict(enumerate(of_seed + noise[i])) for i, x in enumerate(widths)}
        flat = Interval.of(slopes(values).values())
        assert flat is not None and flat.half_width is not None
        grows += flat.positive
        tilted = {x: {s: v + true * x for s, v in by_seed.items()} for x, by_seed in values.items()}
        rising = Interval.of(slopes(tilted).values())
        assert rising is not None and rising.half_width is not None
        covers += abs(rising.mean - true) <= rising.half_width
    assert 0.015 <= grows / draws <= 0.035
    assert 0.93 <= covers / draws <= 0.97


def test_trends_of_a_sweep_are_by_condition_with_their_difference(sweep: Sweep) -> None:
    for noise, rise in ((0.0, 0.0), (0.5, 0.03)):
        for width in (8, 16, 64):
            for seed in range(3):
                sweep.add(0.5, optimizer="sgd", width=width, seed=seed, label_noise=noise, sharpness=1.0)
                gain = rise * math.log10(width) + 0.001 * ((seed * width) % 5)
                sweep.add(
                    0.5 + gain, optimizer="sam", width=width, seed=seed, label_noise=noise, sharpness=0.5 + 0.01 * seed
                )
    report = summarize(sweep.folder)
    found = {(trend.condition["label_noise"], trend.quantity): trend for trend in trends(report)}
    assert set(found) == {(noise, name) for noise in (0.0, 0.5) for name in ("improvement", "a")}
    first, second = found[0.0, "improvement"], found[0.5, "improvement"]
    assert first.beyond is None and second.beyond is not None
    assert second.beyond.mean == pytest.approx(second.slope.mean - first.slope.mean)
    assert "Under label noise 0.5 it grows faster than under the first condition" in benefit(report)
    assert found[0.0, "a"].slope.mean == pytest.approx(0, abs=1e-12)


def test_what_a_seed_lacks_at_some_width_is_not_in_the_slope(sweep: Sweep) -> None:
    for width, seeds in ((8, 3), (32, 2)):
        for seed in range(seeds):
            sweep.add(0.5, optimizer="sgd", width=width, seed=seed)
            sweep.add(0.6, optimizer="sam", width=width, seed=seed)
    (trend,) = trends(summarize(sweep.folder))
    assert trend.slope.n == 2
