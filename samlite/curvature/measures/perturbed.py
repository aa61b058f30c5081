"""How much the loss rises nearby: at worst, and on average.

Andriushchenko et al., "A modern look at the relationship between sharpness and generalization", arXiv 2302.07011, and
their code. The step s is bounded by a radius: |s / c|_p <= radius, with c = 1, or c = |w| (adaptive).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from samlite.batches import is_pair, rows, samples
from samlite.curvature.function import flat_gradient
from samlite.curvature.measures.point import Point, Value
from samlite.curvature.moved import Moved
from samlite.curvature.probes import standard_errors
from samlite.errors import require

Norm = Literal[2, "inf"]
_STEPS = 20  # of APGD, as in the paper
_MOMENTUM, _GAIN = 0.75, 1e-6
_FIRST, _MOST, _EXACT = 10, 200, 0.02  # pairs of random steps, and the relative standard error that is enough


def worst(point: Point, norm: Norm = 2, adaptive: bool = False) -> Value:
    """The mean over groups of m = the batch size of the largest rise of their loss within the radius, by APGD.

    The largest one that was found, so at least this. Starts are the exact gradient step and a random step, each with
    20 steps of APGD and up to 20 of linearised ascent. About 80 gradients and 80 passes forward over the data.
    """
    total = count = 0.0
    generator = point.generator()
    scale = _scale(point, adaptive)
    with point.hessian.separately() as curves:
        for group in _groups(point):
            curves.losses.forget()
            search = _Ascent(curves.losses, group, point.radius, norm, scale)
            total += search.largest(generator) * samples(group)
            count += samples(group)
    require(count > 0, "needs samples, got none")
    return Value(total / count, math.nan, "at least", note=f"radius {point.radius:g}, m = {point.batch_size}")


def average(point: Point, adaptive: bool = False) -> Value:
    """E L(w + s) - L(w) over s = radius c z with z Gaussian, in pairs s, -s, until the standard error is 2 %.

    Two passes forward a pair.
    """
    moved, generator, start = point.moved, point.generator(), point.moved.loss()
    scale = point.radius * _scale(point, adaptive)
    rises: list[float] = []
    look = _FIRST
    while True:
        while len(rises) < look:
            step = scale * torch.randn(len(scale), generator=generator, device="cpu", dtype=torch.float32).to(scale)
            rises.append((moved.loss(step) + moved.loss(-step)) / 2 - start)
        values = torch.tensor(rises, dtype=torch.float64)
        require(bool(values.isfinite().all()), f"the loss is not finite at radius {point.radius:g}; take a smaller one")
        value, error = float(values.mean()), float(standard_errors(values[:, None], skewed=True)[0])
        if error <= _EXACT * abs(value) or look >= _MOST:
            exact = error <= _EXACT * abs(value)
            return Value(value, error, "standard error", 0, exact, f"radius {point.radius:g}, {2 * look} steps")
        look = min(_MOST, look + look // 2)


def _scale(point: Point, adaptive: bool) -> Tensor:
    weights = torch.cat([p.detach().reshape(-1) for p in point.hessian.params])
    return weights.abs() if adaptive else torch.ones_like(weights)


def _groups(point: Point) -> Iterator[Any]:
    """All samples, batch_size at a time."""
    data: Any = point.hessian.data
    for batch in [data] if is_pair(data) else data:
        for start in range(0, samples(batch), point.batch_size):
            yield rows(batch, slice(start, start + point.batch_size))


class _Ascent:
    """APGD (Croce and Hein, arXiv 2003.01690) on the loss of a group in u = s / c, where the ball is round."""

    def __init__(self, losses: Any, group: Any, radius: float, norm: Norm, scale: Tensor) -> None:
        self.losses, self.group, self.radius, self.norm, self.scale = losses, group, radius, norm, scale
        self.moved = Moved(losses)
        self.start = self._loss(torch.zeros_like(scale))

    def largest(self, generator: torch.Generator) -> float:
        """The largest rise that two runs found; never negative, as a step of 0 is allowed."""
        zero = torch.zeros_like(self.scale)
        noise = torch.randn(len(zero), generator=generator, device="cpu", dtype=torch.float32).to(zero)
        best = max(self._polished(*self._climb(start)) for start in (zero, self._projected(noise * self.radius)))
        return max(best - self.start, 0.0)

    def _polished(self, best: float, u: Tensor) -> float:
        """Whole steps to where the linearised loss is largest in the ball, as long as they gain."""
        for _ in range(_STEPS):
            u = self.radius * self._uphill(u)
            value, before = self._loss(u), best
            best = max(best, value)
            if value <= before + _GAIN * abs(before - self.start):
                break
        return best

    def _climb(self, u: Tensor) -> tuple[float, Tensor]:
        size, best_u, best, last = 2 * self.radius, u, self._loss(u), u
        previous_best, previous_size, gains, since = best, size, 0, 0
        checks = _checkpoints(_STEPS)
        for i in range(_STEPS):
            ahead = self._projected(u + size * self._uphill(u))
            value = self._loss(ahead)
            if value > best:  # before momentum, which would leave the boundary
                best, best_u = value, ahead
            after = ahead if i == 0 else self._projected(u + _MOMENTUM * (ahead - u) + (1 - _MOMENTUM) * (u - last))
            last, u = u, after
            value = self._loss(u) if i else value
            if value > best:
                best, best_u, gains = value, u, gains + 1
            if i in checks:
                stalled = gains < 0.75 * (i - since) or (previous_size == size and previous_best == best)
                previous_size, previous_best, gains, since = size, best, 0, i
                if stalled:
                    size, u, last = size / 2, best_u, best_u
        return best, best_u

    def _uphill(self, u: Tensor) -> Tensor:
        with self.moved.at(u * self.scale):
            self.losses.forget()
            total, _ = self.losses.total(self.group)
            g = flat_gradient(total, self.losses.parameters) * self.scale
        if self.norm == "inf":
            return g.sign()
        largest = g.abs().max()
        g = g / largest if largest > 0 else g
        unit: Tensor = g / g.norm().clamp_min(torch.finfo(g.dtype).tiny)
        return unit

    def _loss(self, u: Tensor) -> float:
        with self.moved.at(u * self.scale), torch.no_grad():
            self.losses.forget()
            total, weight = self.losses.total(self.group)
        value = float(total.detach()) / weight
        return value if math.isfinite(value) else -math.inf

    def _projected(self, u: Tensor) -> Tensor:
        if self.norm == "inf":
            return u.clamp(-self.radius, self.radius)
        inside: Tensor = u * (self.radius / u.norm().clamp_min(self.radius))
        return inside


def _checkpoints(steps: int) -> set[int]:
    """The steps at which APGD decides about its step size."""
    at, width, found = 0.22, 0.22, set()
    while at < 1:
        found.add(math.ceil(at * steps))
        width = max(width - 0.03, 0.06)
        at += width
    return found
