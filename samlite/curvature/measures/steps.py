"""Curvature along the steps of training: of mini-batches, and of the optimizer's own next update."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from samlite.batches import is_pair, rows, samples
from samlite.curvature.function import flat_gradient
from samlite.curvature.gauss_newton import Curves
from samlite.curvature.measures.point import Point, Value
from samlite.curvature.probes import standard_errors
from samlite.errors import require

_EXACT = 0.005  # the relative standard error at which batches are enough
_FIRST = 20  # batches
_RISES = 1 / 16  # the relative distance of two steps between which the loss starts to rise
_DOUBLINGS = 60


def batch_sharpness(point: Point) -> Value:
    """E_B[g_B^T H_B g_B / |g_B|^2] over batches B of the training size, drawn without replacement.

    SGD hovers where it is 2/lr. Andreyev and Beneventano, "Edge of stochastic stability", arXiv 2412.20553. About
    three gradients of a batch each, until the standard error is 0.5 %.
    """
    hessian = point.hessian
    hessian.check_exact("batch sharpness")
    quotients: list[Tensor] = []
    look = _FIRST
    with hessian.separately() as curves:
        for batch in _batches(point):
            quotients.append(_quotient(curves, batch))
            if len(quotients) == look:
                value, error = _mean(quotients)
                if error <= _EXACT * abs(value):
                    break
                look += max(1, look // 4)
    require(bool(quotients), "needs batches, got none")
    value, error = _mean(quotients)
    return Value(value, error, "standard error", 0, error <= _EXACT * abs(value), f"{len(quotients)} batches")


def _mean(quotients: list[Tensor]) -> tuple[float, float]:
    values = torch.stack(quotients).double()
    values = values[values.isfinite()]  # a batch without a gradient has no quotient
    require(len(values) > 1, "needs batches with a gradient, got fewer than two")
    return float(values.mean()), float(standard_errors(values[:, None])[0])


def _batches(point: Point) -> Iterator[Any]:
    """Batches of the training size, drawn from a pair of tensors; else those of the data, cut to the size."""
    data: Any = point.hessian.data
    size = point.batch_size
    if is_pair(data):
        generator, n = point.generator(), len(data[0])
        size = min(size, n)
        if size == n:  # the only one there is, twice
            yield from [data, data]
            return
        for _ in range(point.batches):
            chosen = torch.randperm(n, generator=generator)[:size].to(data[0].device)
            yield data[0][chosen], data[1][chosen.to(data[1].device)]
        return
    for batch in data:
        count = samples(batch)
        for start in range(0, count - count % size, size) if count > size else ():
            yield rows(batch, slice(start, start + size))
        if count <= size:
            yield batch


def _quotient(curves: Curves, batch: Any) -> Tensor:
    """g^T H g / |g|^2 of a batch's mean loss; nan where g is 0."""
    losses = curves.losses
    losses.forget()
    total, weight = losses.total(batch)
    whole = curves.kind == "hessian"
    gradient = flat_gradient(total, losses.parameters, create_graph=whole) / weight
    g = gradient.detach()
    g = g / g.abs().max().clamp_min(torch.finfo(g.dtype).tiny)  # squares of small ones underflow
    if whole:
        product = flat_gradient(gradient.dot(g), losses.parameters)
    else:
        losses.forget()
        product = curves.multiplier(batch)(g)
    return g.dot(product) / g.dot(g)


def directional(point: Point) -> Value:
    """D^T H D / (D^T g) along the optimizer's own next update -lr D; without an optimizer along the gradient.

    A step of lr raises the loss's quadratic model where it is above 2/lr. Kalra et al., "A scalable measure of loss
    landscape curvature", arXiv 2601.16979. One product and two gradients.
    """
    update, _ = point.update
    size = update.abs().max()
    update = update / size  # squares of small ones underflow
    slope = _slope(point, update)
    return Value(float(size * update.double().dot((point.hessian @ update).double())) / slope, matvecs=1)


def _slope(point: Point, update: Tensor) -> float:
    """How fast the loss falls along the next update. Raises UsageError where it does not."""
    slope = float(update.double().dot(point.gradient.double()))
    require(slope > 0, "the next update points uphill, as momentum may")
    return slope


def critical(point: Point) -> Value:
    """2/lr_c, lr_c the least step along the optimizer's next update at which the loss rises.

    The step is doubled from lr (or halved, where the loss rises already) and bisected to 1/16 of itself; where the
    loss falls again beyond a rise, that rise may be stepped over. Kalra et al., arXiv 2601.16979. About 10 passes
    forward.
    """
    update, lr = point.update
    start, slope = point.moved.loss(), _slope(point, update)
    rounding = 8 * torch.finfo(update.dtype).eps * abs(start)

    def rises(step: float) -> bool:
        value = point.moved.loss(update * -step)
        return not value <= start  # nan is a rise

    low = high = 0.0
    step = lr
    if rises(step):
        high = step
        for _ in range(_DOUBLINGS):
            step /= 2
            require(step * slope > rounding, "the loss along the next update changes by no more than rounding")
            if not rises(step):
                low = step
                break
            high = step
        require(low > 0, "the loss rises along the next update however small the step")
    else:
        low = step
        for _ in range(_DOUBLINGS):
            step *= 2
            if rises(step):
                high = step
                break
            low = step
        require(high > 0, "the loss rises nowhere along the next update")
    while high - low > _RISES * low:
        middle = (low + high) / 2
        low, high = (low, middle) if rises(middle) else (middle, high)
    return Value((1 / low + 1 / high), 1 / low - 1 / high, "bound")
