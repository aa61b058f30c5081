import math

import pytest
import torch
from scipy import stats

from samlite.curvature.probes import standard_errors, until_exact


def covered(distribution: str, n: int, skewed: bool) -> float:
    """How often mean ± 1.96 errors holds the mean of a distribution, over 20,000 columns."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(n, 20_000, 4, generator=generator, dtype=torch.float64)
    samples, truth = (normal[..., 0], 0.0) if distribution == "normal" else (normal.square().sum(-1), 4.0)
    errors = standard_errors(samples, skewed=skewed)
    return float(((samples.mean(0) - truth).abs() <= 1.96 * errors).double().mean())


@pytest.mark.parametrize("n", [3, 5, 12, 40])
def test_errors_cover_95_percent_of_normal_samples_however_few(n: int) -> None:
    assert covered("normal", n, skewed=False) == pytest.approx(0.95, abs=0.005)  # 3 standard errors of 20,000 trials


def test_errors_of_normal_samples_are_those_of_a_t_test() -> None:
    samples = torch.tensor([0.3, -1.2, 0.7, 2.0, 0.1], dtype=torch.float64)
    expected = stats.t.ppf(0.975, 4) * stats.sem(samples.numpy()) / stats.norm.ppf(0.975)
    assert float(standard_errors(samples[:, None])) == pytest.approx(expected, rel=1e-6)


def test_the_skewness_term_mends_the_interval_of_skewed_samples() -> None:
    """Of chi-squared with 4 degrees of freedom, whose skewness is 1.4."""
    plain, mended = covered("chi-squared", 12, skewed=False), covered("chi-squared", 12, skewed=True)
    assert plain + 0.005 < mended and 0.93 < mended < 0.96  # a trial's share is known to 0.0018


@pytest.mark.parametrize("size", [2.0**-500, 2.0**300])
def test_errors_scale_with_the_samples_to_the_last_digit(size: float) -> None:
    samples = torch.randn(7, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.equal(standard_errors(samples * size, skewed=True), standard_errors(samples, skewed=True) * size)
    assert standard_errors(torch.ones(4, 2)).eq(0).all() and standard_errors(torch.zeros(4, 2), skewed=True).eq(0).all()


class Probes:
    """A probe a product."""

    def __init__(self, limit: int) -> None:
        self.limit, self.matvecs = limit, 0

    @property
    def exhausted(self) -> bool:
        return self.matvecs >= self.limit

    def draw(self, more: int) -> int:
        self.matvecs = min(self.matvecs + more, self.limit)
        return self.matvecs


def run(excesses: list[float], in_a_row: int, limit: int = 1000) -> tuple[bool, list[int]]:
    """(Whether it converged, the number of probes at every look) for the errors at those looks."""
    probes, looks = Probes(limit), []

    def excess() -> float:
        looks.append(probes.matvecs)
        return excesses[len(looks) - 1]

    return until_exact(probes, excess, first_look=12, in_a_row=in_a_row), looks


def test_probes_are_drawn_until_the_error_is_small_twice_in_a_row() -> None:
    assert run([2, 0.9, 1.5, 0.9, 1.0], in_a_row=2) == (True, [12, 15, 18, 22, 27])
    assert run([2, 0.9], in_a_row=1) == (True, [12, 15])


def test_products_that_run_out_end_it_and_an_unknown_error_is_none_that_is_small() -> None:
    assert run([2.0] * 10, in_a_row=2, limit=20) == (False, [12, 15, 18, 20])
    assert run([math.nan, math.inf, 0.5, 0.5], in_a_row=2) == (True, [12, 15, 18, 22])
