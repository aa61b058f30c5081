"""Linear stability of SGD and unnormalised SAM at a minimum, from the moments of the per-sample Hessians.

With learning rate eta and radius rho, one sample a step: w <- w - eta G_i w, G_i = H_i + rho H_i^2. The mean square of
each step is E[(I - eta G_i)^2] = I + eta (eta B - 2 A), with A = mean G_i = M_1 + rho M_2 and
B = mean G_i^2 = M_2 + 2 rho M_3 + rho^2 M_4 (after Wu, Ma and E, "How SGD selects the global minima", 2018).
That no eigenvalue exceeds 1 bounds every single step; the exact mean-square threshold lies somewhat higher.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from samlite.curvature.compiled import compiled
from samlite.curvature.matrix import Progress
from samlite.curvature.operator import Operator
from samlite.curvature.products import HessianProducts, OfMoments
from samlite.curvature.results import Bound, Stability, Verdict
from samlite.curvature.samples import Unit
from samlite.curvature.scaling import ldexp

_NEWTON = 20  # it converges quadratically: 4 to 6 are usual
_STEPS = 200  # of a Krylov space on the range of A: a smaller range is spanned, and its margin exact


class MixtureOperator(OfMoments):
    """c_0 I + c_1 M_1 + c_2 M_2 + ... of a model's present weights, of Hessians over 2^(the moments' exponent)."""

    def __init__(self, hessian: HessianProducts, coefficients: Sequence[float], unit: Unit) -> None:
        super().__init__(hessian, unit)
        self._coefficients = list(coefficients)

    def compose(self, moments: Any) -> Any:
        return compiled().Mixture(moments, self._coefficients)


class Analysis:
    """The eigenproblems behind a verdict, and what they cost, of Hessians over 2^exponent.

    All but the exponent is in that unit, as powers of large and of small Hessians overflow and underflow: eigenvalues
    of A are over 2^exponent, learning rates and radii times that.
    """

    def __init__(
        self, hessian: HessianProducts, rho: float, unit: Unit, tol: float, seed: int, progress: Progress | None
    ) -> None:
        self.hessian, self.unit, self.tol, self.seed, self.progress = hessian, unit, tol, seed, progress
        self.exponent = int(hessian.samples(unit).operator.exponent())
        rho = ldexp(rho, self.exponent)
        self.rho = rho
        self.first = [0.0, 1.0, rho] if rho else [0.0, 1.0]  # A by its coefficients
        self.second = [0.0, 0.0, 1.0, 2 * rho, rho**2] if rho else [0.0, 0.0, 1.0]  # B
        # Directions of little curvature may decide stability, so eigenvalues are found to far less than `tol` of the
        # largest one; to rounding, where a Krylov space spans them all.
        small = hessian.shape[0] <= _STEPS
        self.fine = max(0 if small else 1e-3 * tol, 100 * torch.finfo(hessian.params[0].dtype).eps)
        self.matvecs, self.converged = 0, True

    def mixed(self, a: float, b: float, shift: float = 0.0) -> MixtureOperator:
        """shift I + a A + b B."""
        parts = [self.first, self.second] if b else [self.first]
        length = max(map(len, parts))
        first, second = (part + [0.0] * (length - len(part)) for part in (self.first, self.second[:length]))
        coefficients = [a * x + b * y for x, y in zip(first, second, strict=True)]
        return MixtureOperator(self.hessian, [shift, *coefficients[1:]], self.unit)

    def quotients(self, v: Tensor) -> tuple[float, float]:
        """(v^T A v, v^T B v)."""
        self.matvecs += 2
        return float(v.dot(self.mixed(1, 0) @ v)), float(v.dot(self.mixed(0, 1) @ v))

    def largest(self, a: float, b: float, scale: float, start: Tensor | None = None) -> tuple[float, float, Tensor]:
        """The largest eigenvalue of a A + b B, its error (about `fine` * scale) and its vector."""
        pairs = self.mixed(a, b, scale).eigenvalues(
            1, tol=self.fine, start=start, vectors=True, seed=self.seed, progress=self.progress
        )
        self.count(pairs)
        assert pairs.vectors is not None
        return float(pairs.values[0]) - scale, float(pairs.errors[0]), pairs.vectors[:, 0]

    def count(self, pairs: Any) -> None:
        """Take a solve into the account."""
        self.matvecs += pairs.matvecs
        self.converged &= pairs.converged

    def pencil(self, v: Tensor) -> tuple[float, float]:
        """The largest mu of B x = mu A x and its error, by Newton's method from below (Dinkelbach, 1967).

        The largest eigenvalue of B - mu A is convex in mu, positive below the wanted one and zero there.
        """
        a, scale = self.quotients(v)
        mu = scale / a
        start: Tensor | None = v
        rounding = 10 * torch.finfo(v.dtype).eps
        for _ in range(_NEWTON):
            excess, error, v = self.largest(-mu, 1, scale, start=start)
            below, above = self.quotients(v)
            if below < -2 * error:  # negative curvature that the tolerance of the smallest eigenvalue hid
                return math.nan, math.nan
            # Steps may be far below `tol` while it is still far to go: only the excess tells.
            if excess > error and above > mu * (1 + rounding) * below > 0:
                a, mu, start = below, above / below, v
            elif start is not None:
                start = None  # what a search that starts from v cannot see, one from a random start may
            else:
                return mu, (max(excess, 0.0) + error) / a + self.tol * mu
        self.converged = False
        return mu, math.inf

    def on_range(self, lr: float, scale: float) -> tuple[float, float]:
        """The largest eigenvalue of lr B - 2 A on the range of A, and its error, where none was found above zero.

        A Krylov space that starts in the range stays there but for rounding, whose values near zero are left out.
        Where it does not span the range, a negative value is a lower bound, and zero the upper one; a positive value
        proves that there is one.
        """
        p = self.hessian.shape[0]
        like = self.hessian.params[0]
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        start = torch.randn(p, generator=generator, dtype=torch.float32, device="cpu").to(like.device, like.dtype)
        start = self.mixed(1, 0) @ start
        steps = max(1, min(_STEPS, p, self.hessian.room()))
        with self.mixed(-2, lr).products() as operator:
            measure = compiled().spectral_measure(operator, start, steps)
        self.matvecs += measure.matvecs + 1
        rounding = 100 * torch.finfo(like.dtype).eps * scale
        real = measure.nodes.abs() > rounding
        if not real.any():
            return 0.0, rounding
        margin, residual = float(measure.nodes[real][-1]), float(measure.residuals[real][-1])  # in ascending order
        if margin > 0 or (real.all() and float(measure.residuals.max()) == 0):
            return margin, residual + rounding
        return margin, abs(margin)


def stability(
    hessian: HessianProducts, lr: float, rho: float, unit: Unit, tol: float, seed: int, progress: Progress | None
) -> Stability:
    """See `Hessian.stability`."""
    began = time.perf_counter()
    analysis = Analysis(hessian, rho, unit, tol, seed, progress)
    exponent, rate = analysis.exponent, ldexp(lr, analysis.exponent)
    top = analysis.mixed(1, 0).eigenvalues(1, tol=tol, vectors=True, seed=seed, progress=progress)
    analysis.count(top)
    assert top.vectors is not None
    scale = float(top.values[0])
    if scale > 0:
        opposite, opposite_error, _ = analysis.largest(-1, 0, scale)
        full, error, _ = analysis.largest(-2, rate, 2 * scale)
        convex = opposite <= opposite_error
        mu, mu_error = analysis.pencil(top.vectors[:, 0]) if convex else (math.nan, math.nan)
        convex = convex and not math.isnan(mu)
        max_lr, max_lr_error = 2 / mu, 2 / mu * mu_error / mu
        margin = full
        if full <= error and rate < max_lr - max_lr_error:  # so it is not above zero
            margin, error = analysis.on_range(rate, 2 * scale)
    else:  # no curvature at all moves nothing; none but negative curvature is no minimum
        convex = scale >= -float(top.errors[0])
        full = margin = 0.0
        error, max_lr, max_lr_error = 0.0, math.inf if convex else math.nan, 0.0
    bounds = _bounds(analysis, rate)
    return Stability(
        verdict=_verdict(convex, rate, margin, error, max_lr, max_lr_error),
        value=1 + rate * max(full, margin),
        margin=ldexp(margin, exponent),
        error=ldexp(error, exponent),
        max_lr=ldexp(max_lr, -exponent),
        max_lr_error=ldexp(max_lr_error, -exponent),
        bounds=bounds,
        lr=lr,
        rho=rho,
        unit=unit,
        fallback=hessian.samples(unit).fallback,
        converged=analysis.converged,
        matvecs=analysis.matvecs,
        **hessian.work(time.perf_counter() - began),
    )


def _verdict(convex: bool, lr: float, margin: float, error: float, max_lr: float, max_lr_error: float) -> Verdict:
    """The margin and the largest stable learning rate say the same; either may be the sharper one."""
    if not convex:
        return "not a minimum"
    if margin > error or lr > max_lr + max_lr_error:
        return "unstable"
    if margin < -error or lr < max_lr - max_lr_error:
        return "stable"
    return "undecided"


def _bounds(analysis: Analysis, lr: float) -> dict[str, Bound]:
    """Of the paper: conditions on sharpness and non-uniformity that stability implies."""
    hessian, unit, rho = analysis.hessian, analysis.unit, analysis.rho

    def largest(operator: Operator, power: int) -> float:
        pairs, exponent, _ = operator.eigenpairs(tol=analysis.tol, seed=analysis.seed, progress=analysis.progress)
        analysis.count(pairs)
        return ldexp(float(pairs.values[0]), exponent - power * analysis.exponent)

    def bound(value: float, limit: float, power: int) -> Bound:
        return Bound(ldexp(value, power * analysis.exponent), ldexp(limit, power * analysis.exponent))

    a = largest(hessian, 1)
    bounds = {"a (1 + rho a) <= 2 / lr": bound(a * (1 + rho * a), 2 / lr, 1)}
    if lr > 2 * rho:
        power = largest(hessian.moment_operator(2, unit), 2)
        bounds["s_2^2 <= 1 / (lr (lr - 2 rho))"] = bound(power, 1 / (lr * (lr - 2 * rho)), 2)
        if rho:
            power = largest(hessian.moment_operator(3, unit), 3)
            bounds["s_3^3 <= 1 / (2 lr^2 rho)"] = bound(power, 1 / (2 * lr**2 * rho), 3)
            power = largest(hessian.moment_operator(4, unit), 4)
            bounds["s_4^4 <= 1 / (lr^2 rho^2)"] = bound(power, 1 / (lr * rho) ** 2, 4)
    return bounds
