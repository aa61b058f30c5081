"""Traces of powers of a symmetric matrix from random probes, each with a standard error.

The variance of Hutchinson's z^T H^j z is carried by the few large eigenvalues of a Hessian. A short Lanczos run finds
them, and the traces of its powers, which are known, are subtracted from every sample: the estimate stays unbiased
whatever that run found and for any symmetric H, and only the rest is left to chance.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samlite.curvature.compiled import compiled
from samlite.curvature.matrix import Matrix, Progress
from samlite.curvature.probes import standard_errors, until_exact
from samlite.curvature.results import Estimate
from samlite.curvature.scaling import ldexp, require_float64
from samlite.errors import require

DEFLATION = 20  # Lanczos steps that find the large eigenvalues before a trace is left to chance
FIRST_LOOK, FIRST_LOOK_PLAIN = 12, 30  # probes; without the large eigenvalues taken out, samples are more skewed


def trace(
    matrix: Matrix, tol: float, method: str, seed: int, max_matvecs: int, progress: Progress | None
) -> Estimate[float]:
    """The trace. See `Operator.trace`."""
    powers = _power_traces(matrix, 1, 1, tol, method, seed, max_matvecs, progress)
    return Estimate(*powers.scaled(1), **powers.work)


def frobenius(
    matrix: Matrix, tol: float, method: str, seed: int, max_matvecs: int, progress: Progress | None
) -> Estimate[float]:
    """The Frobenius norm. See `Operator.frobenius`."""
    require(0 < tol < 1, f"tol must be between 0 and 1, got {tol}")
    # The square root halves a relative error.
    powers = _power_traces(matrix, 2, 2, min(2 * tol, 0.99), method, seed, max_matvecs, progress)
    square, error = float(powers.values[1]), float(powers.errors[1])
    norm = math.sqrt(max(square, 0.0))
    stderr = error / (2 * norm) if norm > 0 else math.sqrt(error)
    return Estimate(ldexp(norm, powers.exponent), ldexp(stderr, powers.exponent), **powers.work)


def spectral_moments(
    matrix: Matrix, order: int, tol: float, method: str, seed: int, max_matvecs: int, progress: Progress | None
) -> Estimate[Tensor]:
    """tr(H^j) / p. See `Operator.spectral_moments`."""
    require(isinstance(order, int) and 1 <= order <= 20, f"order must be between 1 and 20, got {order}")
    powers = _power_traces(matrix, order, 1, tol, method, seed, max_matvecs, progress)
    scaled = [powers.scaled(j) for j in range(1, order + 1)]
    values, errors = torch.tensor(scaled, dtype=torch.float64, device="cpu").T / matrix.shape[0]
    return Estimate(values, errors, **powers.work)


@dataclass
class _PowerTraces:
    """tr(H^j) over 2^(j exponent) for j = 1 .. order, with their standard errors."""

    values: Tensor
    errors: Tensor
    exponent: int
    work: dict[str, Any]

    def scaled(self, j: int) -> tuple[float, float]:
        """tr(H^j) and its standard error."""
        value, error = float(self.values[j - 1]), float(self.errors[j - 1])
        require_float64(value, j * self.exponent, f"the traces of H^{j}")
        return ldexp(value, j * self.exponent), ldexp(error, j * self.exponent)


def _power_traces(
    matrix: Matrix, order: int, watched: int, tol: float, method: str, seed: int, limit: int, progress: Progress | None
) -> _PowerTraces:
    """Those from tr(H^watched) on are measured to `tol`."""
    require(0 < tol < 1, f"tol must be between 0 and 1, got {tol}")
    require(method in ("deflated", "hutchinson"), f"method must be 'deflated' or 'hutchinson', got {method!r}")
    require(limit >= 2 * order, f"max_matvecs must be >= {2 * order}, got {limit}")
    deflation = min(DEFLATION, matrix.room(), limit // 4) if method == "deflated" else 0
    rounding = torch.finfo(matrix.params[0].dtype).eps
    began = time.perf_counter()
    with matrix.products() as operator:
        probes = compiled().trace_probes(operator, order, deflation, seed, limit)
        values = errors = probes.known

        def excess() -> float:
            nonlocal values, errors
            values = probes.known + probes.samples.mean(0)
            errors = standard_errors(probes.samples, skewed=True) + rounding * probes.magnitude
            # Rounding is all that is left of a matrix that the Lanczos run spans; zero has no error at all.
            over = (errors / (tol * values.abs())).where(errors > 0, 0)
            return float(over[watched - 1 :].max())

        converged = until_exact(
            probes,
            excess,
            first_look=FIRST_LOOK if deflation > 0 else FIRST_LOOK_PLAIN,
            progress=progress,
        )
        exponent = operator.exponent() + math.frexp(probes.unit())[1] - 1
    counts = {"probes": len(probes.samples), "converged": converged, "matvecs": probes.matvecs}
    return _PowerTraces(values, errors, exponent, {**counts, **matrix.work(time.perf_counter() - began)})
