"""Traces and densities against known matrices, and how often their intervals cover the truth."""

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conftest import Waits
from torch import Tensor, nn

from samlite import Hessian
from samlite.curvature.compiled import compiled
from samlite.curvature.operator import Operator

P = 120


class Known(Operator):
    """A matrix as an operator."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.names, self.memory = matrix, ["w"], 2**30
        self.params = [nn.Parameter(torch.zeros(len(matrix), dtype=matrix.dtype))]

    def products(self) -> Any:
        like = self.matrix[0]
        return nullcontext(compiled().Callable(lambda v: self.matrix @ v, like, len(like)))

    def gradient_seconds(self) -> float:
        return 1.0


def rotated(spectrum: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    q, _ = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=generator, dtype=torch.float64))
    matrix = (q * spectrum) @ q.T
    return (matrix + matrix.T) / 2


SPECTRA = {
    "outliers": torch.cat([torch.linspace(20, 5, 9), torch.linspace(1, 0, P - 9).square()]).double(),
    "indefinite": torch.cat([torch.linspace(9, 2, 6), torch.linspace(1, -0.6, P - 6)]).double(),
    "heavy tail": (1 / torch.arange(1, P + 1)).double(),
}
KNOWN = {name: Known(rotated(spectrum)) for name, spectrum in SPECTRA.items()}


def estimates(operator: Operator, what: str, **options: Any) -> tuple[Tensor, Tensor, int]:
    found = getattr(operator, what)(**options)
    values, errors = (torch.as_tensor(x, dtype=torch.float64).reshape(-1) for x in (found.value, found.stderr))
    return values, errors, found.matvecs


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize(
    ("what", "method", "repetitions"),
    [
        ("trace", "deflated", 200),
        ("frobenius", "deflated", 200),
        ("spectral_moments", "deflated", 200),
        ("trace", "hutchinson", 200),
        ("frobenius", "hutchinson", 200),
        pytest.param("spectral_moments", "hutchinson", 1000, marks=pytest.mark.slow),
    ],
)
def test_intervals_cover_the_truth_as_often_as_they_say(name: str, what: str, method: str, repetitions: int) -> None:
    spectrum = SPECTRA[name]
    truth = {
        "trace": spectrum.sum().reshape(1),
        "frobenius": spectrum.norm().reshape(1),
        "spectral_moments": torch.stack([(spectrum**j).mean() for j in range(1, 5)]),
    }[what]
    covered = torch.zeros(len(truth))
    for seed in range(repetitions):
        values, errors, _ = estimates(KNOWN[name], what, method=method, seed=seed, tol=0.1)
        covered += (values - truth).abs() <= 1.96 * errors
    covered /= repetitions
    assert ((covered >= 0.92) & (covered <= 0.98)).all(), covered


@pytest.mark.parametrize("name", SPECTRA)
def test_estimates_stop_on_their_standard_error_and_deflation_saves_products(name: str) -> None:
    spent = {}
    for method in ("deflated", "hutchinson"):
        values, errors, spent[method] = estimates(KNOWN[name], "trace", method=method, tol=0.02, max_matvecs=10**5)
        assert (errors <= 0.02 * values.abs()).all()
    assert spent["deflated"] < spent["hutchinson"]


def test_products_that_run_out_are_said_and_a_wide_interval_remains() -> None:
    found = KNOWN["outliers"].trace(tol=1e-4, max_matvecs=60)
    assert not found.converged and found.matvecs <= 60
    assert abs(found.value - float(SPECTRA["outliers"].sum())) <= 4 * found.stderr


@pytest.mark.parametrize("method", ["deflated", "hutchinson"])
def test_zero_and_tiny_matrices(method: Any) -> None:
    zero = Known(torch.zeros(30, 30, dtype=torch.float64))
    assert zero.trace(method=method).value == 0 and zero.frobenius(method=method).value == 0
    tiny = Known(rotated(SPECTRA["heavy tail"] * 1e-30).float())
    right = float((SPECTRA["heavy tail"] ** 2).sum().sqrt()) * 1e-30
    assert tiny.frobenius(method=method).value == pytest.approx(right, rel=0.3)


def test_a_space_that_spans_the_matrix_gives_it_exactly() -> None:
    small = Known(rotated(torch.linspace(-1, 2, 15, dtype=torch.float64)))
    found = small.trace()
    assert found.value == pytest.approx(7.5, rel=1e-10) and found.stderr < 1e-10


def smoothed(spectrum: Tensor, grid: Tensor, width: float) -> Tensor:
    normal = torch.exp(-0.5 * ((grid[:, None] - spectrum) / width) ** 2) / (width * math.sqrt(2 * math.pi))
    return normal.mean(1)


@pytest.mark.parametrize("name", SPECTRA)
def test_the_density_is_that_of_the_smoothed_spectrum_within_its_standard_error(name: str) -> None:
    covered = []
    for seed in range(20):
        found = KNOWN[name].density(seed=seed, steps=60, width=0.02 * float(SPECTRA[name].max()))
        assert found.converged
        right = smoothed(SPECTRA[name], found.grid, found.width)
        inside = (found.density - right).abs() <= 1.96 * found.stderr + 1e-3 * right.max()
        covered.append(inside.double().mean())
        assert torch.trapezoid(found.density, found.grid) == pytest.approx(1, abs=0.01)
    assert torch.stack(covered).mean() >= 0.92


def test_density_weights_are_those_of_a_quadrature_rule() -> None:
    found = KNOWN["indefinite"].density(steps=40, tol=0.01)
    assert torch.allclose(found.weights.sum(1), torch.ones(found.probes, dtype=torch.float64))
    moment = (found.weights * found.nodes**2).sum(1)
    right = (SPECTRA["indefinite"] ** 2).mean()
    assert abs(moment.mean() - right) <= 4 * moment.std() / math.sqrt(found.probes)


def test_a_model_is_measured_like_its_dense_hessian() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(40, 4, dtype=torch.float64), torch.randint(0, 3, (40,))
    hessian = Hessian(model, nn.CrossEntropyLoss(), (x, y))
    dense = hessian @ torch.eye(hessian.shape[0], dtype=torch.float64)
    trace, norm = hessian.trace(), hessian.frobenius()
    assert abs(trace.value - float(dense.trace())) <= 4 * trace.stderr
    assert abs(norm.value - float(dense.norm())) <= 4 * norm.stderr
    assert trace.gradient_evaluations > 0


def test_probes_wait_for_the_device_at_looks_only() -> None:
    looks = 0

    def look(matvecs: int, error: float) -> None:
        nonlocal looks
        looks += 1

    with Waits() as waits:
        found = KNOWN["indefinite"].trace(tol=0.01, progress=look)
    assert found.probes > 50 and looks < found.probes / 3
    assert waits.count <= 3 * looks + 2  # at a look, and for the eigenproblem of the Krylov space
    with Waits() as waits:
        probes = KNOWN["indefinite"].density(tol=0.02).probes
    assert waits.count <= 6 * probes  # by a probe of 80 products


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda h: h.trace(tol=0), "tol must be between 0 and 1, got 0"),
        (lambda h: h.trace(method="xtrace"), "method must be 'deflated' or 'hutchinson', got 'xtrace'"),
        (lambda h: h.frobenius(tol=-1), "tol must be between 0 and 1, got -1"),
        (lambda h: h.spectral_moments(0), "order must be between 1 and 20, got 0"),
        (lambda h: h.density(steps=1), "steps must be >= 2, got 1"),
        (lambda h: h.density(width=0), "width must be > 0, got 0"),
    ],
)
def test_bad_arguments_get_one_clear_line(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(KNOWN["outliers"])


@pytest.mark.parametrize("exponent", [-548, -100, 100, 332])
def test_the_size_of_a_matrix_changes_no_digit_of_traces_and_densities(exponent: int) -> None:
    matrix, size = KNOWN["indefinite"].matrix, 2.0**exponent
    right, found = Known(matrix), Known(matrix * size)
    assert found.trace().value / size == right.trace().value
    assert found.trace().stderr / size == right.trace().stderr
    assert found.frobenius().value / size == right.frobenius().value
    if exponent > -548:
        powers = torch.tensor([size, size**2, size**3], dtype=torch.float64)
        assert torch.equal(found.spectral_moments(3).value / powers, right.spectral_moments(3).value)
    assert torch.allclose(found.density(steps=20).density * size, right.density(steps=20).density)


def test_traces_that_a_float64_does_not_hold_are_said() -> None:
    with pytest.raises(ValueError, match=r"the traces of H\^2 must be numbers that a float64 holds"):
        Known(KNOWN["outliers"].matrix * 1e-165).spectral_moments(2)


@pytest.mark.parametrize("what", ["trace", "frobenius", "spectral_moments", "density", "eigenvalues"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_products_that_are_not_finite_are_an_error_at_the_first(what: str, value: float) -> None:
    products = 0

    def product(v: Tensor) -> Tensor:
        nonlocal products
        products += 1
        return torch.full_like(v, value)

    operator = Known(torch.eye(P, dtype=torch.float64))
    operator.products = lambda: nullcontext(compiled().Callable(product, operator.matrix[0], P))  # type: ignore
    with pytest.raises(ValueError, match="the product H v must be finite"):
        getattr(operator, what)()
    assert products == 1


def test_scipy_may_transpose_the_operator_and_multiply_complex_and_whole_numbers() -> None:
    scipy = pytest.importorskip("scipy.sparse.linalg")
    operator = KNOWN["outliers"].to_scipy()
    matrix = KNOWN["outliers"].matrix.numpy()
    singular = scipy.svds(operator, 3, random_state=0)[1]
    assert sorted(singular) == pytest.approx([16.25, 18.125, 20], rel=1e-9)
    v = torch.arange(P).numpy()
    for view in (operator, operator.T, operator.H):
        assert abs(view @ v - matrix @ v).max() < 1e-9
        assert abs(view @ (1j * v) - 1j * (matrix @ v)).max() < 1e-9
    assert (operator @ v[:, None][:, :0]).shape == (P, 0)


def test_products_with_blocks_of_any_kind_are_those_of_the_matrix() -> None:
    operator, matrix = KNOWN["indefinite"], KNOWN["indefinite"].matrix
    block = torch.randn(4, P, dtype=torch.float64).T  # not contiguous
    assert torch.allclose(operator @ block, matrix @ block)
    assert torch.allclose(operator @ block[:, 0].float(), matrix @ block[:, 0].float().double())
    assert torch.allclose(operator @ (1j * block), 1j * (matrix @ block))
    assert (operator @ block[:, :0]).shape == (P, 0)
    small = Known(torch.full((1, 1), -3.0))
    assert float(small @ torch.ones(1)) == -3 and float(small.eigenvalues(1).values) == -3
    assert small.trace().value == -3
