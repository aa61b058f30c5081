"""The loss along lines and over planes through a minimum.

Li et al., "Visualizing the loss landscape of neural nets" (2018), arXiv 1712.09913: a random direction is rescaled
filter by filter to the norms of the weights, and leaves vectors (biases, scales of norms) alone. Between two networks
the loss is taken along the straight line, and its barrier is how far it rises above the line of its two ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from samlite.batches import placed
from samlite.curvature.hessian import Hessian
from samlite.curvature.measures.norms import correct
from samlite.curvature.moved import Moved
from samlite.curvature.parameters import bare
from samlite.curvature.results import Surface
from samlite.curvature.stream import End
from samlite.errors import UsageError, require

Along = Literal["random", "eigenvectors"] | nn.Module | Sequence[nn.Module]
MOST = 401  # points along a line


def surface(
    hessian: Hessian,
    along: Along = "random",
    *,
    plane: bool = False,
    points: int | None = None,
    radius: float | None = None,
    metric: bool = False,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Surface:
    """The loss along a direction through the weights of `hessian`, or over a plane; the weights stay as they are.

    Args:
        along: "random", a filter-normalised Gaussian direction, in units of the filters' norms; "eigenvectors", the
            first one (of a plane the first two) of the Hessian, in units of the weights; another network of the same
            kind, for the line from 0 (these weights) to 1 (those); or two, for the plane through all three.
        plane: over a second direction of the same kind, too.
        points: along each direction; default 41, of a plane 21.
        radius: how far to go to both sides. Default 1; along eigenvectors sqrt(2/lambda_1), where the quadratic model
            has risen by 1. Between networks the line goes from -0.25 to 1.25.
        metric: whether also the accuracy is taken, on (inputs, labels).
        progress: called with (points done, of all).

    Statistics of batch norm are those of the network along directions through it. Between networks they belong to no
    point: they are computed anew from the data at each, and put back. In memory: the directions, and the graph of one
    batch.

    Raises:
        UsageError: an argument is not usable, or networks are not of one kind.
    """
    count = points or (21 if plane or isinstance(along, list | tuple) else 41)
    require(isinstance(count, int) and 2 <= count <= MOST, f"points must be from 2 to {MOST}, got {points}")
    require(radius is None or 0 < radius < math.inf, f"radius must be > 0, got {radius}")
    others = [along] if isinstance(along, nn.Module) else list(along) if isinstance(along, list | tuple) else []
    if others:
        directions = [_towards(hessian, other) for other in others]
        low, high = -0.25, 1.25
        require(len(directions) == 1 or not plane, "plane goes through all networks that are given; leave it out")
        require(len(directions) <= 2, f"along must be one or two networks, got {len(directions)}")
        if plane:
            directions.append(_normalised(hessian, seed))
    elif along == "random":
        directions = [_normalised(hessian, seed + i) for i in range(1 + plane)]
        low, high = -(radius or 1.0), radius or 1.0
    elif along == "eigenvectors":
        directions, reach = _eigenvectors(hessian, 1 + plane, seed)
        low, high = -(radius or reach), radius or reach
    else:
        raise UsageError(f"along must be random, eigenvectors or networks of the same kind, got {along!r}")
    anew = bool(others) and any(_has_statistics(m) for m in hessian.model.modules())
    return _surface(hessian, directions, torch.linspace(low, high, count), anew, metric, bool(others), progress)


def _surface(
    hessian: Hessian,
    directions: list[Tensor],
    axis: Tensor,
    anew: bool,
    metric: bool,
    between: bool,
    progress: Callable[[int, int], None] | None,
) -> Surface:
    moved = hessian.moved()
    axis = axis.double()
    if between:  # both ends are points
        axis = torch.tensor(sorted({*axis.tolist(), 0.0, 1.0}), dtype=torch.float64)
    places = [(t,) for t in axis.tolist()] if len(directions) == 1 else torch.cartesian_prod(axis, axis).tolist()
    losses, scores = [], []
    for i, place in enumerate(places):
        step = torch.zeros_like(directions[0])
        for t, direction in zip(place, directions, strict=True):
            step.add_(direction, alpha=t)
        with _statistics_anew(hessian.model, moved, step) if anew else nullcontext():
            losses.append(moved.loss(step))
            if metric:
                scores.append(moved.mean(lambda batch: correct(moved.losses, batch), step))
        if progress:
            progress(i + 1, len(places))
    shape = [len(axis)] * len(directions)
    values = torch.tensor(losses, dtype=torch.float64).view(shape)
    barrier = _barrier(axis, values) if between and len(directions) == 1 else None
    accuracy = torch.tensor(scores, dtype=torch.float64).view(shape) if metric else None
    return Surface(axis, values, accuracy, barrier, [float(d.double().norm()) for d in directions])


def _barrier(axis: Tensor, values: Tensor) -> float:
    """The largest rise above the line between both ends; 0 where there is none."""
    inside = (axis >= 0) & (axis <= 1)
    t, loss = axis[inside], values[inside]
    return max(0.0, float((loss - ((1 - t) * loss[0] + t * loss[-1])).max()))


def _normalised(hessian: Hessian, seed: int) -> Tensor:
    """A random direction with the norms of the weights' filters, 0 for vectors."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    parts = []
    for p in hessian.params:
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float32, device="cpu").to(p)
        if p.dim() < 2:
            parts.append(torch.zeros_like(noise).reshape(-1))
            continue
        rows, weights = noise.flatten(1), p.detach().flatten(1)
        norms = rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
        parts.append((rows * (weights.norm(dim=1, keepdim=True) / norms)).reshape(-1))
    direction = torch.cat(parts)
    require(bool(direction.any()), "a random direction needs weight matrices, got none")
    return direction


def _eigenvectors(hessian: Hessian, count: int, seed: int) -> tuple[list[Tensor], float]:
    found = hessian.eigenvalues(count, vectors=True, seed=seed, verify=True)
    assert found.vectors is not None
    largest = float(found.values[0])
    require(largest > 0, f"eigenvectors need a positive curvature, got {largest:.3g} at most; use along='random'")
    return list(found.vectors.T), math.sqrt(2 / largest)


def _towards(hessian: Hessian, other: nn.Module) -> Tensor:
    """From these weights to those of another network: (p,)."""
    named = dict(bare(other).named_parameters(remove_duplicate=False))
    parts = []
    for name, p in zip(hessian.names, hessian.params, strict=True):
        theirs = named.get(name)
        if theirs is None or theirs.shape != p.shape:
            got = "none" if theirs is None else str(tuple(theirs.shape))
            raise UsageError(f"networks must be of one kind, got {name} of {tuple(p.shape)} and {got}")
        parts.append((theirs.detach().to(p) - p.detach()).reshape(-1))
    direction = torch.cat(parts)
    require(bool(direction.any()), "networks must have different weights, got the same")
    return direction


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is not None


@contextmanager
def _statistics_anew(model: nn.Module, moved: Moved, step: Tensor) -> Iterator[None]:
    """Inside, the statistics of batch norm are those of the data at w + step: means over its batches."""
    norms: list[Any] = [module for module in model.modules() if _has_statistics(module)]
    kept = [(norm.training, norm.momentum, {name: b.clone() for name, b in norm._buffers.items()}) for norm in norms]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean
            norm.train()
        with moved.at(step), torch.no_grad():
            moved.losses.rewind(0)
            while (batch := moved.losses.next_batch()) is not End:
                moved.losses.loss(model, placed(batch, moved.losses.parameters[0]))
        for norm in norms:
            norm.eval()
        yield
    finally:
        for norm, (_, momentum, buffers) in zip(norms, kept, strict=True):
            norm.momentum = momentum
            for name, buffer in buffers.items():
                if buffer is not None:
                    norm._buffers[name].copy_(buffer)
        for module, mode in modes:
            module.training = mode
