"""Flatness of a layer that rescaling does not change, the Fisher-Rao norm, and how much noise weights bear."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from samlite.curvature.measures.point import Point, Value
from samlite.curvature.moved import Moved
from samlite.curvature.preconditioner import Sandwich
from samlite.curvature.probes import standard_errors
from samlite.errors import UsageError, require

_DROP = 0.1  # of accuracy
_DRAWS, _DEPTH, _LARGEST = 10, 20, 2.0


def relative_flatness(point: Point) -> Value:
    """sum over neurons s, s' of a layer <w_s, w_s'> tr H_{s,s'}, of the last layer with a weight matrix.

    Petzka et al., "Relative flatness and generalization", arXiv 2001.00939. The trace of C H C with C the root of
    W W^T on the neurons: about as many products with the layer's block as a trace takes.
    """
    layer = next((p for p in reversed(point.hessian.params) if p.dim() >= 2), None)
    require(layer is not None, "needs a layer with a weight matrix")
    assert layer is not None
    name = point.hessian.names[[id(p) for p in point.hessian.params].index(id(layer))]
    block = point.hessian.restricted([layer])
    rows = len(layer)
    weights = layer.detach().reshape(rows, -1).double()
    values, vectors = torch.linalg.eigh(weights @ weights.T)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    factor = root.to(layer)

    def product(v: Tensor) -> Tensor:
        mixed: Tensor = factor @ v.view(rows, -1)
        return mixed.reshape(-1)

    trace = Sandwich(block, product, float(values[-1].clamp_min(0).sqrt())).trace(0.02, seed=point.seed)
    return Value(trace.value, trace.stderr, "standard error", trace.matvecs, trace.converged, f"of {name}")


def fisher_rao(point: Point) -> Value:
    """E_i <w, g_i>^2, with g_i the gradient of sample i's loss: the squared Fisher-Rao norm.

    Liang et al., "Fisher-Rao metric, geometry, and complexity of neural networks", arXiv 1711.01530. About two
    gradients.
    """
    hessian = point.hessian
    w = torch.cat([p.detach().reshape(-1) for p in hessian.params])
    squares = hessian.sample_slopes(w).square()
    sums = torch.stack([squares.sum(), squares.new_tensor(float(len(squares)))])
    if hessian.sum is not None:
        hessian.sum(sums)
    return Value(float(sums[0] / sums[1]))


def pac_bayes(point: Point) -> Value:
    """The largest sigma at which Gaussian noise sigma z on the weights costs 0.1 of the accuracy on these data.

    Neyshabur et al., "Exploring generalization in deep learning", arXiv 1706.08947; the same draws z at every sigma,
    bisected between 0 and 2. About 200 passes forward.
    """
    moved, generator, p = point.moved, point.generator(), point.hessian.shape[0]
    like = point.hessian.params[0]
    draws = torch.randn(_DRAWS, p, generator=generator, device="cpu", dtype=torch.float32)
    start = _accuracy(moved, None)

    def drops(sigma: float) -> Tensor:
        found = []
        for z in draws:
            found.append(start - _accuracy(moved, sigma * z.to(like)))
        return torch.tensor(found, dtype=torch.float64)

    require(float(drops(_LARGEST).mean()) > _DROP, f"noise of {_LARGEST:g} costs less than {_DROP} of the accuracy")
    low, high = 0.0, _LARGEST
    for _ in range(_DEPTH):
        middle = (low + high) / 2
        low, high = (low, middle) if float(drops(middle).mean()) > _DROP else (middle, high)
        if high - low < 1e-3 * high:
            break
    sigma = (low + high) / 2
    here = drops(sigma)
    slope = float((drops(1.1 * sigma) - drops(0.9 * sigma)).mean()) / (0.2 * sigma)
    error = float(standard_errors(here[:, None])[0]) / slope if slope > 0 else math.inf
    return Value(sigma, error, "standard error", 0, error < 0.5 * sigma, f"{_DRAWS} draws")


def _accuracy(moved: Moved, step: Tensor | None) -> float:
    return moved.mean(lambda batch: correct(moved.losses, batch), step)


def correct(losses: Any, batch: Any) -> tuple[Tensor, float]:
    """(How many labels of a batch the largest output hits, their number)."""
    if not (isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor)):
        raise UsageError("needs (inputs, labels) as data")
    labels = batch[1]
    require(not labels.is_floating_point(), "needs integer labels of classes as targets")
    found: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            found.append(output)

    handle = losses.model.register_forward_hook(keep)
    try:
        losses.total(batch)
    finally:
        handle.remove()
    require(bool(found), "needs a model whose output is a tensor of scores")
    scores = found[-1]
    dim = next((d for d in (1, scores.dim() - 1) if _without(scores.shape, d) == tuple(labels.shape)), None)
    if dim is None:
        raise UsageError("needs one score a class for every label")
    known = labels.to(scores.device)
    counted = known >= 0  # what is not to be predicted is negative
    return ((scores.argmax(dim) == known) & counted).sum(), float(counted.sum())


def _without(shape: torch.Size, dim: int) -> tuple[int, ...]:
    return tuple(size for i, size in enumerate(shape) if i != dim)
