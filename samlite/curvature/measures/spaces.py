"""Eigenvectors: how much of the gradient lies along the largest ones, how many weights carry them, who shares them."""

from __future__ import annotations

import torch
from torch import Tensor

from samlite.curvature.measures.point import Point, Value
from samlite.errors import require


def alignment(point: Point) -> Value:
    """|V^T g|^2 / |g|^2, the part of the gradient in the space V of the k largest eigenvalues.

    Gur-Ari, Roberts and Dyer, "Gradient descent happens in a tiny subspace", arXiv 1812.04754. The cost of k + 1
    eigenvalues.
    """
    k = min(point.k, point.hessian.shape[0])
    V, sine = point.spaces(k)  # noqa: N806
    g = point.gradient / point.gradient.norm()
    return Value(float((V.T @ g).square().sum()), sine, "bound", 0, sine < 1, f"k = {k}")


def participation(point: Point) -> Value:
    """sum v_i^4 of the first eigenvector: 1 where one weight carries it, 1/p where all do alike.

    The cost of k + 1 eigenvalues.
    """
    V, sine = point.spaces(1)  # noqa: N806
    v = V[:, 0].double()
    # |v^3| times the change of v, which is at most sqrt(2) times the sine
    error = 4 * float(v.pow(3).norm()) * 2**0.5 * sine + 6 * 2 * sine**2
    return Value(float(v.pow(4).sum()), min(error, 1.0), "bound", 0, sine < 1)


def overlap(point: Point) -> Value:
    """tr(P_1 P_2) / k, how far the top spaces of two checkpoints are the same: 1 for one space, k/p for chance.

    arXiv 1812.04754. The cost of k + 1 eigenvalues of each.
    """
    require(point.other is not None, "needs another checkpoint of the same network (other)")
    assert point.other is not None
    require(point.other.shape == point.hessian.shape, "needs another checkpoint of the same number of parameters")
    k = min(point.k, point.hessian.shape[0])
    beside = Point(point.other, k=point.k, tol=point.tol, seed=point.seed)
    (first, sine), (second, sine2) = point.spaces(k), beside.spaces(k)
    error = min(2 * (sine + sine2), 1.0)
    return Value(shared(first, second), error, "bound", beside.top.matvecs, error < 1, f"k = {k}")


def shared(first: Tensor, second: Tensor) -> float:
    """tr(P_1 P_2) / k of the spaces of two bases (p, k)."""
    (a, _), (b, _) = torch.linalg.qr(first.double()), torch.linalg.qr(second.double().to(first.device))
    return float((a.T @ b).square().sum() / a.shape[1])
