"""The spectral density of a symmetric matrix by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor, nn

from samlite.curvature.compiled import compiled
from samlite.curvature.matrix import Matrix, Progress
from samlite.curvature.probes import standard_errors, until_exact
from samlite.curvature.results import Density
from samlite.curvature.scaling import ldexp, ldexp_block, multiplied
from samlite.errors import require

FIRST_LOOK = 3  # probes, each of many products


def density(
    matrix: Matrix,
    tol: float,
    steps: int,
    width: float | None,
    points: int,
    seed: int,
    max_matvecs: int,
    progress: Progress | None,
) -> Density:
    """The smoothed density. See `Operator.density`."""
    require(0 < tol < 1, f"tol must be between 0 and 1, got {tol}")
    require(isinstance(steps, int) and steps >= 2, f"steps must be >= 2, got {steps}")
    require(width is None or width > 0, f"width must be > 0, got {width}")
    require(isinstance(points, int) and points >= 2, f"points must be >= 2, got {points}")
    began = time.perf_counter()
    with matrix.products() as operator:
        rules = _Rules(operator, matrix, max(2, min(steps, matrix.shape[0], matrix.room())), seed, max_matvecs)
        smooth = _Smooth(rules, width, points)
        converged = until_exact(
            rules,
            lambda: smooth.look() / tol,
            first_look=FIRST_LOOK,
            in_a_row=1,  # luck averages out over the grid
            progress=progress,
        )
    fields: dict[str, Any] = {**smooth.fields(), **matrix.work(time.perf_counter() - began)}
    return Density(
        **fields,
        weights=rules.weights,
        probes=len(rules.nodes),
        converged=converged,
        matvecs=rules.matvecs,
    )


class _Rules:
    """Quadrature rules, each from a Lanczos run of a random start: nodes and weights (probes, steps)."""

    def __init__(self, operator: Any, matrix: Matrix, steps: int, seed: int, limit: int) -> None:
        self.operator, self.like, self.steps, self.limit = operator, matrix.params[0], steps, limit
        self.generator = torch.Generator(device="cpu").manual_seed(seed)
        self.nodes, self.weights = torch.zeros(2, 0, steps, dtype=torch.float64, device="cpu")
        self.matvecs, self.p = 0, matrix.shape[0]

    def draw(self, more: int) -> int:
        """Take so many more rules, fewer where products run out; return how many there are."""
        for _ in range(more):
            if self.exhausted:
                break
            signs = torch.randint(0, 2, (self.p,), generator=self.generator, dtype=torch.float32, device="cpu") * 2 - 1
            measure = compiled().spectral_measure(self.operator, signs.to(self.like), self.steps)
            self.matvecs += measure.matvecs
            padding = (0, self.steps - len(measure.nodes))
            self.nodes = torch.cat([self.nodes, nn.functional.pad(measure.nodes, padding)[None]])
            self.weights = torch.cat([self.weights, nn.functional.pad(measure.weights, padding)[None]])
        return len(self.nodes)

    @property
    def exhausted(self) -> bool:
        """Whether another rule would take more products than allowed."""
        return len(self.nodes) >= FIRST_LOOK and self.matvecs + self.steps > self.limit


class _Smooth:
    """The mean of the rules under a Gaussian, in a unit near the largest node: squares of large densities overflow."""

    def __init__(self, rules: _Rules, width: float | None, points: int) -> None:
        self.rules, self.width, self.points = rules, width, points

    def look(self) -> float:
        """The mean standard error over the mean density."""
        self.unit = math.frexp(float(self.rules.nodes.abs().max()))[1]
        self.exponent = self.unit + self.rules.operator.exponent()
        width = None if self.width is None else ldexp(self.width, -self.exponent)
        nodes = ldexp_block(self.rules.nodes, -self.unit)
        self.grid, curves, self.sigma = _smoothed(nodes, self.rules.weights, width, self.points)
        self.mean, self.stderr = curves.mean(0), standard_errors(curves)
        return float(self.stderr.mean() / self.mean.mean())

    def fields(self) -> dict[str, Any]:
        """The grid, the density there and the nodes, without the unit."""
        return {
            "grid": multiplied(self.grid, self.exponent),
            "density": multiplied(self.mean, -self.exponent),
            "stderr": ldexp_block(self.stderr, -self.exponent),
            "nodes": multiplied(self.rules.nodes, self.exponent - self.unit),
            "width": ldexp(self.sigma, self.exponent),
        }


def _smoothed(nodes: Tensor, weights: Tensor, width: float | None, points: int) -> tuple[Tensor, Tensor, float]:
    """(points,) of the grid, each probe's density there, and the width of the Gaussian."""
    low, high = float(nodes.min()), float(nodes.max())
    extent = max(high - low, abs(high), abs(low)) or 1e-30  # any, where all eigenvalues are 0
    # A rule of m nodes resolves about extent / m: a narrower Gaussian would show the nodes themselves.
    sigma = width or extent * max(0.01, 1 / nodes.shape[1])
    grid = torch.linspace(low - 4 * sigma, high + 4 * sigma, points, dtype=torch.float64, device="cpu")
    normal = torch.exp(-0.5 * ((grid[:, None, None] - nodes) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
    return grid, (normal * weights).sum(2).T, sigma
