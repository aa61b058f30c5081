"""The eigen-solver on matrices whose spectrum is known."""

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from samlite.curvature.compiled import compiled

BULK = 120


def symmetric(spectrum: list[float], size: int = BULK, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A float64 matrix with the given eigenvalues, filled up in [-1, 1], and all eigenvalues, largest first."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    rest = 2 * torch.rand(size - len(spectrum), generator=generator, dtype=torch.float64) - 1
    matrix = (q * torch.cat([torch.tensor(spectrum, dtype=torch.float64), rest])) @ q.T
    matrix = (matrix + matrix.T) / 2
    return matrix, torch.linalg.eigvalsh(matrix).flip(0)


def solve(matrix: Tensor, which: str = "LA", method: str = "lanczos", **options: Any) -> Any:
    module = compiled()
    operator = module.Callable(lambda v: matrix @ v, matrix[0], len(matrix))
    return module.eigenpairs(operator, module.Options(**options), which=which, method=method)


def numbers(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def wanted(eigenvalues: Tensor, which: str, k: int) -> Tensor:
    order = {"LA": eigenvalues, "SA": -eigenvalues, "LM": eigenvalues.abs()}[which].argsort(descending=True)
    return eigenvalues[order[:k]]


def within_errors(found: Any, eigenvalues: Tensor) -> bool:
    """Every value has an eigenvalue within its stated error."""
    values, errors = numbers(found.values), numbers(found.errors)
    return bool(((values[:, None] - eigenvalues).abs().min(dim=1).values <= errors).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_eigenvalues_are_within_their_errors_of_a_known_spectrum(dtype: Any, which: str, k: int) -> None:
    matrix, eigenvalues = symmetric([50, 30, 20, 10, 6, 4, -40, -25, -12, -7, -5])
    found = solve(matrix.to(dtype), which, k=k, verify=True)
    assert found.converged and found.complete
    assert within_errors(found, eigenvalues)
    # tol is 1e-3: so are the values
    assert torch.allclose(numbers(found.values), wanted(eigenvalues, which, k), rtol=1e-3)


def test_vectors_are_orthonormal_and_have_the_stated_residuals() -> None:
    matrix, _ = symmetric([50, 30, 20, 10, 6])
    found = solve(matrix, k=4, tol=1e-8)
    x = found.vectors
    assert torch.allclose(x @ x.T, torch.eye(4, dtype=torch.float64), atol=1e-12)
    residuals = torch.linalg.vector_norm(x @ matrix - numbers(found.values)[:, None] * x, dim=1)
    # the certificate adds the rounding of one product to each
    assert torch.allclose(residuals, numbers(found.residuals), atol=1e-11)


def test_repeated_eigenvalues_are_returned_as_often_as_they_occur() -> None:
    matrix, _ = symmetric([50, 50, 50, 30, 30, 20], size=400)
    found = solve(matrix, k=6, verify=True)
    assert found.complete
    assert [round(value, 1) for value in found.values] == [50, 50, 50, 30, 30, 20]


def test_clusters_closer_than_a_residual_are_resolved_or_bounded() -> None:
    for seed in range(60):
        draw = random.Random(seed)
        spectrum = [
            draw.choice([10, 20, 40]) + draw.choice([0, 1e-3, 0.01, 0.1, 0.3, 1]) * draw.random()
            for _ in range(draw.randint(3, 10))
        ]
        matrix, eigenvalues = symmetric(spectrum, seed=seed)
        k = draw.choice([2, 3, 5])
        found = solve(matrix, k=k, verify=True, seed=seed)
        assert found.converged and found.complete, seed
        assert within_errors(found, eigenvalues), seed
        # none that is larger than the k-th by more than tol was missed
        assert (numbers(found.values) >= eigenvalues[:k] * (1 - 2e-3)).all(), seed


def test_a_single_eigenvalue_in_a_cluster_is_within_its_residual_without_verify() -> None:
    for seed in range(40):
        matrix, eigenvalues = symmetric([10 + 0.1 * random.Random(seed).random(), 10, 9.9], seed=seed)
        found = solve(matrix, separated=False, seed=seed)
        assert found.converged and within_errors(found, eigenvalues), seed


def test_the_search_finishes_within_ten_products_where_the_rest_of_the_spectrum_lies_below() -> None:
    matrix, _ = symmetric([50, 40, 30, 20, 10], size=400)
    without, with_search = solve(matrix, k=5, verify=False), solve(matrix, k=5, verify=True)
    assert without.complete is None and with_search.complete is True
    assert with_search.matvecs - without.matvecs <= 10


@pytest.mark.parametrize("k", [1, 3])
def test_the_basis_may_be_as_small_as_2k_plus_2_vectors(k: int) -> None:
    matrix, eigenvalues = symmetric([50, 30, 20, 10], size=400)
    found = solve(matrix, k=k, basis=2 * k + 2, verify=True)
    assert found.converged and found.complete
    assert torch.allclose(numbers(found.values), eigenvalues[:k], rtol=1e-3)


def test_restarts_keep_what_a_large_basis_finds() -> None:
    matrix, eigenvalues = symmetric([2, 1.9, 1.8], size=400)
    small, large = solve(matrix, k=3, basis=12, tol=1e-6), solve(matrix, k=3, basis=200, tol=1e-6)
    assert small.matvecs > 12
    for found in (small, large):
        assert found.converged and torch.allclose(numbers(found.values), eigenvalues[:3], rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_breakdown_is_relative_to_the_size_of_the_matrix(scale: float) -> None:
    matrix = scale * torch.diag(torch.tensor([5.0, 5, 3, 3, 3, 1] + [0.0] * 14, dtype=torch.float64))
    found = solve(matrix, k=6, verify=True)
    assert found.converged and found.complete
    assert torch.allclose(numbers(found.values) / scale, numbers([5, 5, 3, 3, 3, 1]), atol=1e-9)


@pytest.mark.parametrize("method", ["lanczos", "power"])
@pytest.mark.parametrize("matrix", [torch.zeros(30, 30), torch.eye(30), 4 * torch.ones(1, 1)])
def test_matrices_without_a_gap_give_their_eigenvalue(matrix: Tensor, method: str) -> None:
    for k in {1, min(3, len(matrix)), len(matrix)}:
        found = solve(matrix, method=method, k=k)
        assert found.converged
        assert torch.allclose(numbers(found.values), torch.linalg.eigvalsh(matrix.double())[-k:].flip(0), atol=1e-5)


def test_k_up_to_the_whole_dimension_gives_the_whole_spectrum() -> None:
    matrix, eigenvalues = symmetric([9, 9, 4], size=24)
    found = solve(matrix, k=24, tol=1e-6)
    assert found.converged and found.complete is not False
    assert torch.allclose(numbers(found.values), eigenvalues, atol=1e-9)


def test_a_start_that_is_another_eigenvector_does_not_hide_the_largest() -> None:
    matrix, eigenvalues = symmetric([50, 30, 20])
    wrong = torch.linalg.eigh(matrix).eigenvectors[:, [-2]].T.contiguous()
    found = solve(matrix, k=1, start=wrong, verify=True)
    assert found.complete and found.values[0] == pytest.approx(float(eigenvalues[0]), rel=1e-3)


def test_a_warm_start_needs_fewer_products() -> None:
    matrix, _ = symmetric([50, 40, 30, 20, 10], size=400)
    noise, _ = symmetric([], size=400, seed=1)
    nearby = matrix + 0.1 * noise
    eigenvalues = torch.linalg.eigvalsh(nearby).flip(0)
    start = solve(matrix, k=3, tol=1e-6).vectors
    cold, warm = solve(nearby, k=3), solve(nearby, k=3, start=start)
    assert warm.converged and within_errors(warm, eigenvalues)
    assert warm.matvecs < cold.matvecs / 1.5


def test_products_running_out_is_said_and_errors_still_hold() -> None:
    matrix, eigenvalues = symmetric([])
    for options in ({"k": 5, "max_matvecs": 15}, {"k": 5, "max_matvecs": 15, "start": torch.eye(BULK).double()[:5]}):
        found = solve(matrix, **options)
        assert not found.converged
        assert found.matvecs <= 20  # a certificate may follow
        assert within_errors(found, eigenvalues)


def test_a_search_that_does_not_finish_is_not_called_complete() -> None:
    matrix, _ = symmetric([50, 30, 20])
    plain = solve(matrix, k=3)
    assert solve(matrix, k=3, verify=True, max_matvecs=plain.matvecs + 1).complete is False


def test_asking_for_more_than_float32_holds_is_not_called_converged() -> None:
    matrix, eigenvalues = symmetric([50, 30, 20])
    found = solve(matrix.float(), k=2, tol=1e-10)
    assert not found.converged and found.matvecs < 100
    assert within_errors(found, eigenvalues)


def test_the_certificate_exposes_a_matrix_that_changes_between_products() -> None:
    matrix, _ = symmetric([50, 30, 20])
    generator = torch.Generator().manual_seed(0)
    module = compiled()

    def product(v: Tensor) -> Tensor:
        return matrix @ v + torch.randn(BULK, generator=generator, dtype=torch.float64)

    found = module.eigenpairs(module.Callable(product, matrix[0], BULK), module.Options(k=2, max_matvecs=200))
    assert not found.converged
    assert min(found.residuals) > 1  # of order sqrt(BULK), the size of the noise


def test_the_certificate_exposes_an_asymmetric_matrix() -> None:
    matrix, _ = symmetric([50, 30, 20])
    skew = torch.randn(BULK, BULK, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert not solve(matrix + (skew - skew.T), k=2, max_matvecs=200).converged


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_products_that_are_not_finite_are_an_error(value: float) -> None:
    for method in ("lanczos", "power"):
        with pytest.raises(ValueError, match="must be finite"):
            solve(torch.full((5, 5), value), method=method)


def test_an_operator_of_the_wrong_shape_is_an_error() -> None:
    module = compiled()
    with pytest.raises(ValueError, match="the product must be like its vector"):
        module.eigenpairs(module.Callable(lambda v: v[:-1], torch.ones(5), 5), module.Options())


def test_an_error_in_the_operator_keeps_its_type() -> None:
    def fail(v: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        compiled().eigenpairs(compiled().Callable(fail, torch.ones(5), 5), compiled().Options())


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_power_iteration_finds_the_end_that_was_asked_for(which: str) -> None:
    matrix, eigenvalues = symmetric([20, 12, 7, -40, -25, -13])
    found = solve(matrix, which, "power", k=2, max_matvecs=3000)
    assert found.converged and within_errors(found, eigenvalues)
    assert torch.allclose(numbers(found.values), wanted(eigenvalues, which, 2), rtol=2e-3)


def test_power_iteration_does_not_stop_early_on_a_small_gap() -> None:
    matrix, eigenvalues = symmetric([1.10, 1.08, 1.06])
    found = solve(matrix, method="power", max_matvecs=50)
    assert not found.converged and within_errors(found, eigenvalues)


def random_problem(seed: int) -> tuple[Tensor, str, dict[str, Any]]:
    """A matrix of clustered, repeated, paired or even eigenvalues, and what is asked of it, hard cases often."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    p = draw.choice([5, 10, 20, 50, 100])
    spectrum = 2 * torch.rand(p, generator=generator, dtype=torch.float64) - 1
    n = draw.randint(1, min(10, p))
    some = torch.rand(n, generator=generator, dtype=torch.float64)
    kind = draw.choice(["cluster", "repeated", "paired", "even", "random"])
    if kind == "cluster":
        spectrum[:n] = draw.choice([10, 1.5]) + draw.choice([1e-6, 1e-4, 1e-2, 0.1]) * some
    elif kind == "repeated":
        spectrum[:n] = 10.0
        spectrum[n // 2 : n] *= draw.choice([0.5, -1, 0.999])
    elif kind == "paired":
        half = min(n, p // 2)
        spectrum[:half] = 1 + 10 * some[:half]
        spectrum[half : 2 * half] = -spectrum[:half] * (1 + draw.choice([0, 1e-5, 1e-3]))
    elif kind == "even":
        spectrum = torch.linspace(-1, 1, p, dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.randn(p, p, generator=generator, dtype=torch.float64))
    matrix = (q * spectrum) @ q.T
    matrix = ((matrix + matrix.T) / 2).to(draw.choice([torch.float32, torch.float64]))
    k = draw.randint(1, min(8, p))
    options: dict[str, Any] = {
        "k": k,
        "seed": seed,
        "tol": draw.choice([1e-2, 1e-3, 1e-5]),
        "basis": max(2 * k + 2, draw.choice([0, 0, 100])),
        "max_matvecs": max(k + 1, draw.choice([k + 1, 2 * k + 10, 60, 300])),
        "verify": True,
    }
    if draw.random() < 0.3:
        start = q.T[draw.sample(range(p), draw.randint(1, k))]
        noise = torch.randn(start.shape, generator=generator, dtype=torch.float64)
        options["start"] = (start + draw.choice([0, 1e-3, 0.1]) * noise).to(matrix).contiguous()
    return matrix, draw.choice(["LA", "SA", "LM"]), options


def check_no_statement_is_wrong(seeds: range) -> None:
    """Errors hold, converged or not; `complete` says that none was missed, which fails once in 1,000 times at most."""
    missed = 0
    for seed in seeds:
        matrix, which, options = random_problem(seed)
        found = solve(matrix, which, **options)
        eigenvalues = torch.linalg.eigvalsh(matrix.double())
        values, errors = numbers(found.values), numbers(found.errors)
        # the eigenvalues that it is compared with have a rounding of their own
        off = (values[:, None] - eigenvalues).abs().min(dim=1).values - 1e-14 * eigenvalues.abs().max()
        assert (off <= errors).all(), seed
        if found.complete:
            best = wanted(eigenvalues, which, options["k"])
            rank = {"LA": best - values, "SA": values - best, "LM": best.abs() - values.abs()}[which]
            missed += bool((rank > errors + options["tol"] * values.abs() + 1e-5 * eigenvalues.abs().max()).any())
    assert missed <= max(1, len(seeds) / 500)


def test_no_stated_error_is_exceeded_on_hard_spectra_whatever_is_asked() -> None:
    check_no_statement_is_wrong(range(250))


@pytest.mark.slow
def test_no_stated_error_is_exceeded_on_many_hard_spectra() -> None:
    check_no_statement_is_wrong(range(250, 8000))


def test_a_search_that_does_not_finish_leaves_errors_that_need_no_gap() -> None:
    spectrum = torch.linspace(-1, 1, 100, dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.randn(100, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    for seed in range(20):
        found = solve(((q * spectrum) @ q.T).float(), "LM", basis=4, verify=True, seed=seed, max_matvecs=200)
        if found.complete is False:
            assert found.errors[0] >= found.residuals[0]
        assert within_errors(found, spectrum)


@pytest.mark.parametrize("method", ["lanczos", "power"])
@pytest.mark.parametrize(
    ("dtype", "exponents"), [(torch.float64, [-548, -133, 332, 400]), (torch.float32, [-90, -33, 33, 100])]
)
def test_the_size_of_a_matrix_changes_no_digit(method: str, dtype: Any, exponents: list[int]) -> None:
    matrix, _ = symmetric([50, 30, 20, -40])
    matrix = matrix.to(dtype)
    options = {"k": 3, "verify": method == "lanczos", "method": method, "max_matvecs": 400}
    right = solve(matrix, "LM", **options)
    for exponent in exponents:
        found = solve(matrix * 2.0**exponent, "LM", **options)
        assert found.converged == right.converged and found.matvecs == right.matvecs
        for name in ("values", "errors", "residuals"):
            scaled = [value / 2.0**exponent for value in getattr(found, name)]
            assert scaled == list(getattr(right, name)), (exponent, name)


@pytest.mark.parametrize("method", ["lanczos", "power"])
def test_products_that_underflow_are_said(method: str) -> None:
    matrix, _ = symmetric([50, 30, 20])
    with pytest.raises(ValueError, match="must not underflow.* or measure in float64"):
        solve((matrix * 2.0**-130).float(), method=method)
    with pytest.raises(ValueError, match="must not underflow"):
        solve(matrix * 1e-307, method=method)
