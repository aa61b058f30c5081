"""Products of the Hessian by central differences of the gradient, for losses that autograd cannot differentiate twice.

H v = (g(w + h v) - g(w - h v)) / 2h + O(h²), with the gradients of a copy of the model, in float64 where the loss can
be computed so. The step h is the one, of several a factor of 4 apart, whose product changes least when it is doubled:
larger steps see the third derivative, smaller ones rounding. That change bounds the error of a product: of c h² it is
three times, of rounding at least once.
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from samlite.curvature.function import Losses
from samlite.curvature.memory import graph_bytes
from samlite.distributed import Ranks
from samlite.errors import UsageError

_STEPS = [4.0**-i for i in range(2, 14)]  # relative to the norm of the weights


class Differences:
    """H v for vectors like the weights, by gradients on both sides of them."""

    def __init__(self, losses: Losses, ranks: Ranks | None, memory: int) -> None:
        self._ranks = ranks
        self._losses, began = _copied(losses, memory), time.perf_counter()
        self._weights = torch.cat([p.detach().reshape(-1) for p in self._losses.parameters])
        self._gradient(self._weights)
        self.gradient_seconds = time.perf_counter() - began
        self._length = max(float(self._weights.norm()), math.sqrt(len(self._weights)) * 1e-3)
        self._step, self.precision = self._balanced()

    def __call__(self, v: Tensor) -> Tensor:
        """H v, with two gradients."""
        return self._product(v.to(self._weights), self._step).to(v)

    def error(self, v: Tensor) -> float:
        """A bound on the error of H v, with four gradients."""
        return self._change(v.to(self._weights), self._step)[0]

    def _balanced(self) -> tuple[float, float]:
        """(The step at which a product of a random vector is most certain, its relative error)."""
        generator = torch.Generator(device="cpu").manual_seed(0)
        v = torch.randn(len(self._weights), generator=generator, dtype=torch.float64, device="cpu").to(self._weights)
        best = (math.inf, _STEPS[0])
        for step in _STEPS:
            change, size = self._change(v, step)
            relative = change / size if size > 0 else 0.0 if change == 0 else math.inf
            if relative > 100 * best[0]:
                break  # rounding, from here on more of it
            best = min(best, (relative, step))
        if not best[0] < 0.1:
            raise UsageError(
                "products='finite-difference' needs a gradient that is smooth around the weights and the same at every "
                f"pass, got products that change by {best[0]:.1e} of themselves with the step"
            )
        return best[1], best[0]

    def _change(self, v: Tensor, step: float) -> tuple[float, float]:
        """(How much H v changes with twice the step, its norm)."""
        product = self._product(v, step)
        return float((product - self._product(v, 2 * step)).norm()), float(product.norm())

    def _product(self, v: Tensor, step: float) -> Tensor:
        norm = float(v.norm())
        if norm == 0:
            return torch.zeros_like(v)
        h = step * self._length / norm
        return (self._gradient(self._weights + h * v) - self._gradient(self._weights - h * v)) / (2 * h)

    def _gradient(self, weights: Tensor) -> Tensor:
        """The gradient of the mean loss at other weights."""
        parameters = self._losses.parameters
        with torch.no_grad():
            for p, values in zip(parameters, torch.split(weights, [p.numel() for p in parameters]), strict=True):
                p.copy_(values.view_as(p))
        sums, weight = self._losses.gradient()
        if self._ranks:
            self._ranks.sum(sums)
            weight = self._ranks.total(weight)
        return sums / weight


def _copied(losses: Losses, memory: int) -> Losses:
    """The same losses of a copy of the model, in float64 where they can be computed so."""
    try:
        twin = _cut(losses.copied(torch.float64), memory)
        twin.gradient()
    except (RuntimeError, TypeError, UsageError):  # kernels for float32 alone, a device without float64
        try:
            twin = _cut(losses.copied(losses.parameters[0].dtype), memory)
        except (RuntimeError, TypeError) as error:
            raise UsageError(
                f"products='finite-difference' needs a model that can be copied, got {type(error).__name__}: {error}"
            ) from error
    return twin


def _cut(losses: Losses, memory: int) -> Losses:
    """The losses with as many rows a chunk as have a graph within the memory."""
    if losses.divisible:
        constants = [*losses.parameters, *losses.data]
        losses.fit(lambda batch: graph_bytes([losses.total(batch)[0]], constants), memory)
    return losses
