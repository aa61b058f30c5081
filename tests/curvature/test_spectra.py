"""Eigenvalues of single samples' Hessians, against dense ones."""

import pytest
import torch
from models import network, samples
from oracles import dense_hessians
from torch import nn

from samlite import Hessian, UsageError

pytestmark = pytest.mark.usefixtures("float64")
CRITERION = nn.CrossEntropyLoss()


def test_each_value_is_the_largest_of_its_samples_own_hessian():
    model, (x, y) = network(), samples(8)
    right = torch.linalg.eigvalsh(dense_hessians(model, CRITERION, x, y))[:, -1]
    found = Hessian(model, CRITERION, [(x[:3], y[:3]), (x[3:], y[3:])]).sample_eigenvalues(tol=1e-6)
    assert found.converged and len(found.values) == 8
    assert ((found.values - right).abs() <= found.errors + 1e-12).all()
    drawn = Hessian(model, CRITERION, (x, y)).sample_eigenvalues(5, tol=1e-6)
    assert len(drawn.values) == 5 and all(float((v - right).abs().min()) < 1e-6 for v in drawn.values)


def test_gauss_newton_matrices_of_samples():
    model, (x, y) = network(), samples(3)
    found = Hessian(model, CRITERION, [(x, y)], curvature="ggn").sample_eigenvalues(tol=1e-6)
    for i, value in enumerate(found.values.tolist()):
        alone = Hessian(model, CRITERION, (x[i : i + 1], y[i : i + 1]), curvature="ggn").eigenvalues(1, tol=1e-6)
        assert value == pytest.approx(float(alone.values[0]), rel=1e-5)


def test_finite_differences_are_refused():
    model, (x, y) = network(), samples(3)
    with pytest.raises(UsageError, match="products must be 'autograd' for eigenvalues of single samples"):
        Hessian(model, CRITERION, (x, y), products="finite-difference").sample_eigenvalues()
