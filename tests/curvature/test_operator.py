"""The solvers of anybody's symmetric matrix."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from samlite import Operator, UsageError

P = 60
SPECTRUM = torch.cat([torch.tensor([9.0, 9.0, 7.0]), torch.linspace(-3, 5, P - 3)]).double()


def matrix(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(P, P, generator=generator, dtype=torch.float64))
    return (basis * SPECTRUM @ basis.T).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_matrix_given_by_its_products_has_its_eigenvalues(dtype: torch.dtype) -> None:
    known = matrix(dtype)
    operator = Operator.of(lambda v: known @ v, torch.empty(P, dtype=dtype))
    top = operator.eigenvalues(4, tol=1e-5, vectors=True)
    truth = SPECTRUM.sort(descending=True).values[:4]
    assert top.converged and top.complete
    assert bool(((top.values - truth).abs() <= top.errors).all())
    assert top.vectors is not None and (known @ top.vectors[:, 0] - 9 * top.vectors[:, 0]).norm() < 1e-3
    v = torch.ones(P, dtype=dtype)
    assert torch.allclose(operator @ v, known @ v) and operator.shape == (P, P)
    assert torch.allclose(torch.from_numpy(operator.to_scipy() @ v.numpy()), known @ v)
    smallest = operator.eigenvalues(1, "SA", tol=1e-5)
    assert float(smallest.values[0]) == pytest.approx(-3, abs=float(smallest.errors[0]))


def test_its_trace_norm_and_density_are_those_of_the_matrix() -> None:
    known = matrix()
    operator = Operator.of(lambda v: known @ v, known[0])
    trace, norm = operator.trace(0.01), operator.frobenius(0.01)
    assert abs(trace.value - float(SPECTRUM.sum())) <= 4 * trace.stderr + 1e-9
    assert abs(norm.value - float(SPECTRUM.norm())) <= 4 * norm.stderr + 1e-9
    density = operator.density(0.3, steps=20)
    assert float(torch.trapezoid(density.density, density.grid)) == pytest.approx(1, abs=0.01)  # the tails are cut


BAD: dict[str, tuple[Callable[[Tensor], Any], Any, str]] = {
    "not symmetric": (lambda v: torch.ones(P, P).double().triu() @ v, torch.empty(P).double(), "must be symmetric"),
    "another shape": (lambda v: v[:3], torch.empty(P), "matvec must return a vector like"),
    "another type": (lambda v: v.double(), torch.empty(P), "matvec must return a vector like"),
    "like is a matrix": (lambda v: v, torch.empty(3, 3), "like must be a float32 or float64 vector"),
    "like is whole": (lambda v: v, torch.arange(3), "like must be a float32 or float64 vector"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_symmetric_matrix_is_refused_in_one_line(name: str) -> None:
    matvec, like, message = BAD[name]
    with pytest.raises(UsageError, match=message):
        Operator.of(matvec, like).eigenvalues()


def test_products_that_are_nan_are_said() -> None:
    with pytest.raises(UsageError, match="must be finite"):
        Operator.of(lambda v: v * torch.nan, torch.empty(P)).eigenvalues()
