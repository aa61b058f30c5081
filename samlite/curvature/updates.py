"""The step that an optimizer would take next, without taking it."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from samlite.batches import described
from samlite.curvature.moved import Moved
from samlite.curvature.preconditioner import base_of, groups_of
from samlite.errors import UsageError, require


def next_update(moved: Moved, optimizer: Optimizer | None) -> tuple[Tensor, float]:
    """(D, lr): with the full gradient the optimizer would step from w to w - lr D; lr is that of its first group.

    D is (p,) in the parameters' type, computed in float64; it has all of momentum, preconditioning and weight decay.
    Of SAM the gradient is that at the perturbed weights. Without an optimizer D is the gradient, and lr is 1.

    Raises:
        UsageError: the optimizer has not these parameters, or no learning rate.
    """
    gradient = moved.gradient()
    if optimizer is None:
        return gradient, 1.0
    params = moved.losses.parameters
    base = base_of(optimizer)
    groups = groups_of(base, params)
    lr = float(base.param_groups[0]["lr"])
    require(lr > 0, f"lr must be > 0 for an update, got {lr}")
    if base is not optimizer and any(group.get("rho") for group in base.param_groups):
        gradient = moved.gradient(_ascent(groups, params, gradient))
    twins = {id(p): p.detach().to(torch.float64, copy=True).requires_grad_() for p in params}
    twin = _twin(base, twins)
    for p, part in zip(params, _parts(gradient, params), strict=True):
        twins[id(p)].grad = part.view(p.shape).double()
    with torch.no_grad():
        before = [twins[id(p)].clone() for p in params]
        twin.step()
        steps = [(old - twins[id(p)]).reshape(-1) / lr for old, p in zip(before, params, strict=True)]
    return torch.cat([step.to(params[0].device) for step in steps]).to(params[0].dtype), lr


def _parts(flat: Tensor, params: list[Any]) -> tuple[Tensor, ...]:
    return torch.split(flat, [p.numel() for p in params])


def _twin(base: Optimizer, twins: dict[int, Tensor]) -> Optimizer:
    """The optimizer of other parameters, with its state in their type."""
    try:
        twin = deepcopy(base, dict(twins))  # which takes these for copies of the parameters
    except Exception as error:
        raise UsageError(f"optimizer must be one that can be copied, got {described(base)}: {error}") from error
    for p, state in twin.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.is_floating_point() and value.shape == p.shape and value.dim():
                state[name] = value.double()
    return twin


def _ascent(groups: dict[int, dict[str, Any]], params: list[Any], gradient: Tensor) -> Tensor:
    """The perturbation of SAM from this gradient: (p,)."""
    parts = _parts(gradient, params)
    scaled = [
        part * p.detach().reshape(-1).abs() if groups[id(p)]["adaptive"] else part
        for p, part in zip(params, parts, strict=True)
    ]
    norm = torch.cat(scaled).norm().clamp_min(torch.finfo(gradient.dtype).tiny)
    steps = []
    for p, part in zip(params, scaled, strict=True):
        group = groups[id(p)]
        step = part * p.detach().reshape(-1).abs() if group["adaptive"] else part
        steps.append(float(group["rho"]) * (step / norm if group["normalize"] else step))
    return torch.cat(steps)
