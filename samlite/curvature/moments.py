"""Moments of the per-sample Hessians, M_k = (1/n) sum_i H_i^k, and their non-uniformity.

Definitions: s_k = lambda_max(M_k - H^k)^(1/k), after Wu, Ma and E, "How SGD selects the global minima" (2018). M_k v
costs k steps, each about as much as a product H v.
"""

import math
import time
import warnings

from samlite.curvature.matrix import Progress
from samlite.curvature.products import HessianProducts
from samlite.curvature.results import Moments
from samlite.curvature.samples import Unit
from samlite.curvature.scaling import holds, ldexp


def moments(
    hessian: HessianProducts, order: int, unit: Unit, tol: float, seed: int, progress: Progress | None
) -> Moments:
    """See `Hessian.moments`."""
    began = time.perf_counter()
    first = hessian.eigenvalues(1, tol=tol, seed=seed, progress=progress)
    powers, errors, nonuniformity = {}, {1: float(first.errors[0])}, {}
    converged, matvecs = first.converged, first.matvecs
    for k in range(2, order + 1):
        operator = hessian.moment_operator(k, unit)
        pairs, exponent, _ = operator.eigenpairs(tol=tol, seed=seed, progress=progress)
        power, error = pairs.values[0], pairs.errors[0]
        # The root is taken of the matrix over 2^exponent, a multiple of k.
        nonuniformity[k] = ldexp(power ** (1 / k), exponent // k) if power > error else 0.0
        known = holds(max(abs(power), error), exponent)
        if not known:
            warnings.warn(
                f"M_{k} - H^{k} is about 2^{exponent}, which a float64 does not hold: its power and error are nan; "
                f"s_{k} is right",
                stacklevel=3,
            )
        powers[k] = ldexp(power, exponent) if known else math.nan
        errors[k] = ldexp(error, exponent) if known else math.nan
        converged, matvecs = converged and pairs.converged, matvecs + pairs.matvecs
    return Moments(
        sharpness=float(first.values[0]),
        nonuniformity=nonuniformity,
        powers=powers,
        errors=errors,
        unit=unit,
        fallback=hessian.samples(unit).fallback,
        converged=converged,
        matvecs=matvecs,
        **hessian.work(time.perf_counter() - began),
    )
