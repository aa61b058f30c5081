"""Products by differences of the gradient, against autograd, and against a loss without a second derivative."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samlite import Hessian, UsageError


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def data(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(40, 4, generator=torch.Generator().manual_seed(1)).to(dtype), torch.arange(40) % 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_and_eigenvalues_are_those_of_autograd(dtype: torch.dtype) -> None:
    model = network(dtype)
    state = [p.clone() for p in model.parameters()]
    exact = Hessian(model, nn.CrossEntropyLoss(), data(dtype))
    differences = Hessian(model, nn.CrossEntropyLoss(), data(dtype), products="finite-difference")
    v = torch.randn(exact.shape[0], dtype=dtype)
    # eps^(2/3) of float64 for the differences, or the rounding of float32 around them
    allowed = 1e-9 if dtype == torch.float64 else 1e-6
    assert (exact @ v - differences @ v).norm() <= allowed * (exact @ v).norm()
    right, found = exact.eigenvalues(3, tol=1e-9 if dtype == torch.float64 else 1e-5), differences.eigenvalues(3)
    assert found.converged and bool(((found.values - right.values).abs() <= found.errors + right.errors).all())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), state, strict=True))


class Rounding(torch.autograd.Function):
    """The identity, with a gradient whose error is known."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return (gradient * 2**10).float().to(gradient.dtype) / 2**10


def test_the_error_of_differences_is_in_the_bound() -> None:
    """A gradient in float32 inside a float64 loss leaves errors a thousand times those of float64."""
    model, x = network(torch.float64), data(torch.float64)
    right = Hessian(model, nn.CrossEntropyLoss(), x).eigenvalues(1, tol=1e-9)
    rounded = Hessian(
        model, lambda m, b: F.cross_entropy(Rounding.apply(m(b[0])), b[1]), x, products="finite-difference"
    )
    found = rounded.eigenvalues(1, tol=1e-9)
    error = float((found.values - right.values).abs())
    assert 1e-9 * float(right.values) < error <= float(found.errors) and not found.converged


def test_a_loss_without_a_second_derivative_is_measured_and_offered_the_way() -> None:
    model, x = network(torch.float64), torch.randn(12, 5, 4, dtype=torch.float64)
    targets = torch.tensor([[1, 2], [2, 1], [1, 1]]).repeat(4, 1)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        lengths = torch.full((len(batch[0]),), 5), torch.full((len(batch[0]),), 2)
        return F.ctc_loss(model(batch[0]).log_softmax(-1).transpose(0, 1), batch[1], *lengths)

    with pytest.raises(UsageError, match=r"ctc.*use products='finite-difference'"):
        Hessian(model, loss, (x, targets)).eigenvalues()
    found = Hessian(model, loss, (x, targets), products="finite-difference").eigenvalues(vectors=True)
    assert found.converged
    v, parameters = found.vectors[:, 0], list(model.parameters())
    h, slopes = 1e-4, []
    for sign in (1, -1, -1):  # of the gradient along v, on both sides, and back
        with torch.no_grad():
            for p, part in zip(parameters, v.split([p.numel() for p in parameters]), strict=True):
                p.add_(sign * h * part.view_as(p))
        gradient = torch.autograd.grad(loss(model, (x, targets)), parameters)
        slopes.append(float(torch.cat([g.reshape(-1) for g in gradient]) @ v))
        h = 1e-4 if sign == -1 else 2e-4
    assert (slopes[0] - slopes[1]) / 2e-4 == pytest.approx(float(found.values[0]), rel=1e-5)


def test_what_differences_cannot_do_gets_one_line() -> None:
    model, x = network(torch.float64), data(torch.float64)
    with pytest.raises(UsageError, match="products must be 'autograd' or 'finite-difference', got 'exact'"):
        Hessian(model, nn.CrossEntropyLoss(), x, products="exact")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="needs curvature='hessian', got 'ggn'"):
        Hessian(model, nn.CrossEntropyLoss(), x, curvature="ggn", products="finite-difference")
    with pytest.raises(UsageError, match="moments of samples need products='autograd'"):
        Hessian(model, nn.CrossEntropyLoss(), x, products="finite-difference").moments()
