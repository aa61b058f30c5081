"""Ground truth that several tests compare with: dense matrices by autograd."""

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel


def dense_hessian(model: nn.Module, loss: Callable[[Any], Tensor], names: list[str] | None = None) -> Tensor:
    """The Hessian of loss(model) by the named parameters, by autograd in the dtype of those."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad and (names is None or n in names)}
    shapes = {n: p.shape for n, p in parameters.items()}
    flat = torch.cat([p.detach().reshape(-1) for p in parameters.values()]).requires_grad_()

    def value(w: Tensor) -> Tensor:
        pieces = w.split([shape.numel() for shape in shapes.values()])
        weights = {n: piece.view(shapes[n]) for n, piece in zip(shapes, pieces, strict=True)}
        return loss(lambda *inputs: functional_call(model, weights, inputs))

    # outer products of fused attention have no second derivative
    with sdpa_kernel(SDPBackend.MATH):
        (gradient,) = torch.autograd.grad(value(flat), flat, create_graph=True, materialize_grads=True)
        return _jacobian(gradient, [flat])


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """By its formula: the second derivative of torch's own is wrong."""
    return g * v / v.square().sum([d for d in range(v.dim()) if d != dim % v.dim()], keepdim=True).sqrt()


def dense_hessians(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """(n, p, p) per-sample Hessians, by autograd."""
    params = list(model.parameters())
    hessians = []
    with sdpa_kernel(SDPBackend.MATH), mock.patch("torch._weight_norm", _weight_norm):
        for i in range(len(x)):
            loss = criterion(model(x[i : i + 1]), y[i : i + 1])
            parts = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
            hessians.append(_jacobian(torch.cat([part.reshape(-1) for part in parts]), params))
    return torch.stack(hessians)


def _jacobian(values: Tensor, params: Sequence[Tensor]) -> Tensor:
    """(m, p), all rows at once, or one by one where torch cannot vectorise a derivative, as of conv3d."""
    if not values.requires_grad:
        return values.new_zeros(len(values), sum(p.numel() for p in params))

    def pulled_back(cotangents: Tensor, batched: bool) -> Tensor:
        parts = torch.autograd.grad(
            values, params, cotangents, retain_graph=True, materialize_grads=True, is_grads_batched=batched
        )
        return torch.cat([part.reshape(*cotangents.shape[:-1], -1) for part in parts], -1)

    every = torch.eye(len(values), dtype=values.dtype)
    try:
        return pulled_back(every, True)
    except RuntimeError:
        return torch.stack([pulled_back(row, False) for row in every])


def dense_gauss_newton(model: nn.Module, x: Tensor) -> Tensor:
    """(n, p, p) per-sample Gauss-Newton matrices of cross-entropy, from Jacobians and its known Hessian."""
    params = list(model.parameters())
    matrices = []
    for i in range(len(x)):
        outputs = model(x[i : i + 1])[0]
        rows = [torch.autograd.grad(z, params, retain_graph=True, materialize_grads=True) for z in outputs]
        jacobian = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])
        p = outputs.detach().softmax(0)
        matrices.append(jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian)
    return torch.stack(matrices)


def moment(hessians: Tensor, order: int) -> Tensor:
    return torch.linalg.matrix_power(hessians, order).mean(0)


def largest(matrix: Tensor) -> float:
    return float(torch.linalg.eigvalsh(matrix)[-1])
