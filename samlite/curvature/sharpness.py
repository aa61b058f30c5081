"""The three notions of sharpness that SAM may lower, and curvature layer by layer.

Wen, Ma and Li, "How does sharpness-aware minimization minimize sharpness?" (2023): the worst direction's is
lambda_max(H), the ascent direction's g^T H g / |g|^2, the average direction's proportional to trace(H).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from samlite.curvature.operator import Eigenvalues, Estimate, Progress, check_steady, require
from samlite.errors import UsageError

if TYPE_CHECKING:
    from samlite.curvature.hessian import Hessian


@dataclass(frozen=True)
class Sharpness:
    """Worst-, ascent- and average-direction sharpness at one point."""

    worst: float  # lambda_max(H)
    worst_error: float
    ascent: float  # g^T H g / |g|^2 along the full gradient; nan where it is 0
    ascent_samples: float  # mean of g_i^T H_i g_i / |g_i|^2 over the samples whose gradient is not 0; else nan
    average: float  # trace(H)
    average_stderr: float
    notes: tuple[str, ...]  # why a value is nan
    converged: bool
    matvecs: int
    gradient_evaluations: float
    seconds: float


@dataclass(frozen=True)
class Block:
    """The curvature of one layer: the diagonal block of its own parameters."""

    parameters: int
    eigenvalues: Eigenvalues
    trace: Estimate[float]


def sharpness(hessian: Hessian, tol: float, seed: int, progress: Progress | None) -> Sharpness:
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
        float(top.values[0]),
        float(top.errors[0]),
        ascent,
        ascent_samples,
        trace.value,
        trace.stderr,
        tuple(notes),
        top.converged and trace.converged,
        top.matvecs + trace.matvecs + 1,
        **hessian._work(time.perf_counter() - began),
    )


def _ascent(hessian: Hessian) -> float:
    """u^T H u of the unit vector u along the gradient, nan where that is 0."""
    gradient = hessian.gradient()
    require(bool(gradient.isfinite().all()), "the gradient must be finite, got nan or inf in it; check loss and data")
    largest = gradient.abs().max()
    if largest == 0:
        return math.nan
    direction = gradient / largest  # as the squares of a small gradient underflow
    return float(direction.dot(hessian @ direction) / direction.dot(direction))


def _ascent_of_samples(hessian: Hessian) -> tuple[float, str]:
    """The mean over samples, or nan and the reason."""
    if hessian.curvature == "ggn":
        return math.nan, "the ascent of single samples is measured with curvature='hessian' only"
    try:
        samples = hessian._samples("sample")
    except UsageError as error:  # samples that are not told apart
        return math.nan, f"no ascent of single samples: {error}"
    if samples.fallback:
        return math.nan, f"the ascent of single samples has no rule for {samples.fallback}"
    with hessian._losses.neutral():
        value = float(samples.operator.ascent())
    check_steady(samples.operator)
    return value, "the gradient of every sample is 0" if math.isnan(value) else ""


def blocks(hessian: Hessian, k: int, tol: float, seed: int, progress: Progress | None) -> dict[str, Block]:
    """See `Hessian.blocks`."""
    layers: dict[str, list[torch.nn.Parameter]] = {}
    for name, param in zip(hessian.names, hessian.params, strict=True):
        name = name.replace(".parametrizations.weight.original", ".weight")  # of a masked layer
        if param.numel():
            layers.setdefault(name.rpartition(".")[0] or name, []).append(param)
    found = {}
    for layer, params in layers.items():
        block = hessian.restricted(params)
        most = min(k, block.shape[0])
        values = block.eigenvalues(most, seed=seed, progress=progress)
        found[layer] = Block(block.shape[0], values, block.trace(tol, seed=seed, progress=progress))
    return found
