"""The three notions of sharpness that SAM may lower, and curvature layer by layer.

Wen, Ma and Li, "How does sharpness-aware minimization minimize sharpness?" (2023): the worst direction's is
lambda_max(H), the ascent direction's g^T H g / |g|^2, the average direction's proportional to trace(H).
"""

from __future__ import annotations

import math
import time

import torch
from torch.optim import Optimizer

from samlite.curvature.matrix import Progress
from samlite.curvature.preconditioner import preconditioned
from samlite.curvature.products import HessianProducts
from samlite.curvature.results import Block, Sharpness
from samlite.errors import UsageError, require


def sharpness(hessian: HessianProducts, tol: float, seed: int, progress: Progress | None) -> Sharpness:
    """See `Hessian.sharpness`."""
    began = time.perf_counter()
    top = hessian.eigenvalues(1, tol=min(tol, 1e-3), seed=seed, progress=progress)
    trace = hessian.trace(tol, seed=seed, progress=progress)
    notes = []
    ascent = _ascent(hessian)
    if math.isnan(ascent):
        notes.append("the full gradient is 0")
    ascent_samples, note = _ascent_of_samples(hessian)
    if note:
        notes.append(note)
    return Sharpness(
        worst=float(top.values[0]),
        worst_error=float(top.errors[0]),
        ascent=ascent,
        ascent_samples=ascent_samples,
        average=trace.value,
        average_stderr=trace.stderr,
        notes=tuple(notes),
        converged=top.converged and trace.converged,
        matvecs=top.matvecs + trace.matvecs + 1,
        **hessian.work(time.perf_counter() - began),
    )


def _ascent(hessian: HessianProducts) -> float:
    """u^T H u of the unit vector u along the gradient, nan where that is 0."""
    gradient = hessian.gradient()
    require(bool(gradient.isfinite().all()), "the gradient must be finite, got nan or inf in it; check loss and data")
    largest = gradient.abs().max()
    if largest == 0:
        return math.nan
    direction = gradient / largest  # as the squares of a small gradient underflow
    return float(direction.dot(hessian @ direction) / direction.dot(direction))


def _ascent_of_samples(hessian: HessianProducts) -> tuple[float, str]:
    """The mean over samples, or nan and the reason."""
    if hessian.curvature == "ggn":
        return math.nan, "the ascent of single samples is measured with curvature='hessian' only"
    try:
        samples = hessian.samples("sample")
    except UsageError as error:  # samples that are not told apart
        return math.nan, f"no ascent of single samples: {error}"
    if samples.fallback:
        return math.nan, f"the ascent of single samples has no rule for {samples.fallback}"
    with hessian.sample_products("sample") as moments:
        value = float(moments.ascent())
    return value, "the gradient of every sample is 0" if math.isnan(value) else ""


def blocks(
    hessian: HessianProducts, k: int, tol: float, by: Optimizer | None, seed: int, progress: Progress | None
) -> dict[str, Block]:
    """See `Hessian.blocks`."""
    layers: dict[str, list[torch.nn.Parameter]] = {}
    for name, param in zip(hessian.names, hessian.params, strict=True):
        name = name.replace(".parametrizations.weight.original", ".weight")  # of a masked layer
        if param.numel():
            layers.setdefault(name.rpartition(".")[0] or name, []).append(param)
    result = {}
    for layer, params in layers.items():
        own = hessian.restricted(params)
        block = own if by is None else preconditioned(own, by)
        most = min(k, block.shape[0])
        values = block.eigenvalues(most, seed=seed, progress=progress)
        result[layer] = Block(block.shape[0], values, block.trace(tol, seed=seed, progress=progress))
    return result
