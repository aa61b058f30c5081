"""The three sharpnesses and the layers' blocks, against dense per-sample Hessians in float64."""

import math

import pytest
import torch
from models import prepared
from oracles import dense_hessians
from torch import Tensor, nn

from samlite import Hessian

pytestmark = pytest.mark.usefixtures("float64")


def gradients(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    rows = []
    for i in range(len(x)):
        parts = torch.autograd.grad(
            criterion(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters()), materialize_grads=True
        )
        rows.append(torch.cat([part.reshape(-1) for part in parts]))
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["MLP", "CNN with batch norm and residuals", "tied weights"])
def test_three_sharpnesses_are_those_of_dense_hessians(name):
    model, x, y = prepared(name)
    criterion = nn.CrossEntropyLoss()
    hessians, slopes = dense_hessians(model, criterion, x, y), gradients(model, criterion, x, y)
    mean, g = hessians.mean(0), slopes.mean(0)
    found = Hessian(model, criterion, (x, y)).sharpness()
    assert found.worst == pytest.approx(float(torch.linalg.eigvalsh(mean)[-1]), abs=found.worst_error)
    assert found.ascent == pytest.approx(float(g @ mean @ g / (g @ g)), rel=1e-9)
    quotients = torch.einsum("ni,nij,nj->n", slopes, hessians, slopes) / slopes.square().sum(1)
    assert found.ascent_samples == pytest.approx(float(quotients.mean()), rel=1e-9)
    assert abs(found.average - float(mean.trace())) <= 4 * found.average_stderr
    assert not found.notes


def test_a_gradient_of_zero_has_no_ascent_and_says_so():
    model = nn.Linear(3, 1)
    x = torch.randn(5, 3)
    found = Hessian(model, nn.MSELoss(), (x, model(x).detach())).sharpness()
    assert math.isnan(found.ascent) and math.isnan(found.ascent_samples)
    assert found.notes == ("the full gradient is 0", "the gradient of every sample is 0")


def test_blocks_are_the_diagonal_blocks_of_the_layers():
    model, x, y = prepared("MLP")
    hessian = Hessian(model, nn.CrossEntropyLoss(), (x, y))
    mean = dense_hessians(model, nn.CrossEntropyLoss(), x, y).mean(0)
    found = hessian.blocks(k=2)
    assert list(found) == ["0", "2"] and [block.parameters for block in found.values()] == [25, 18]
    for block, part in zip(found.values(), (mean[:25, :25], mean[25:, 25:]), strict=True):
        right = torch.linalg.eigvalsh(part).flip(0)[:2]
        assert (block.eigenvalues.values - right).abs().le(block.eigenvalues.errors).all()
        assert abs(block.trace.value - float(part.trace())) <= 4 * block.trace.stderr + 1e-12


@pytest.mark.parametrize(("dtype", "exponents"), [(torch.float64, [-548, 332]), (torch.float32, [-70, 70])])
def test_sharpness_scales_with_the_loss(dtype, exponents):
    model, x, y = prepared("MLP")
    model, x = model.to(dtype), x.to(dtype)

    def found(exponent):
        def loss(model, batch):
            return nn.functional.cross_entropy(model(batch[0]), batch[1]) * 2.0**exponent

        result = Hessian(model, loss, (x, y)).sharpness()
        return torch.tensor([result.worst, result.ascent, result.ascent_samples, result.average]) / 2.0**exponent

    right = found(0)
    for exponent in exponents:
        assert torch.allclose(found(exponent), right, rtol=20 * torch.finfo(dtype).eps)
