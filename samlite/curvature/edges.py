"""The edge of stability: the curvature above which the steps of an optimizer grow instead of shrink.

On a quadratic whose preconditioner stands still, each formula below is exact: an eigenvalue below the threshold
shrinks, one above it grows.

    gradient descent   2/lr - decay                                  Cohen et al. 2021, arXiv 2103.00065
    Polyak             (2 + 2 beta) / (lr (1 - dampening)) - decay   the same
    Nesterov           (2 + 2 beta) / (lr (1 + 2 beta)) - decay      the same
    RMSprop, Adagrad   2/lr, of P^-1 (H + decay I)                   Cohen et al. 2022, arXiv 2207.14484
    Adam               (2 + 2 beta1) / ((1 - beta1) lr), of P^-1 (H + decay I)
    AdamW              (1 + beta1) (2/lr - decay) / (1 - beta1), of P^-1 H
    SAM, unnormalised  (sqrt(1 + 4 rho T) - 1) / (2 rho), T the threshold of the base optimizer
    SAM                the same with rho/|g| in place of rho         Long and Bartlett 2023, arXiv 2309.12488
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from samlite.curvature.preconditioner import base_of
from samlite.errors import UsageError, require

Curvature = Literal["hessian", "preconditioned"]


@dataclass(frozen=True)
class Edge:
    """Where the steps of an optimizer stop being stable."""

    threshold: float
    """The largest stable eigenvalue; of several parameter groups the least."""
    formula: str
    """The threshold in symbols."""
    curvature: Curvature
    """Whose largest eigenvalue it is compared with: the "hessian", or ``h.preconditioned(optimizer, decay=decay)``."""
    decay: float
    """What weight decay adds to the Hessian before it is preconditioned."""


def edges(optimizer: Optimizer, gradient: Tensor | float | None = None) -> Edge:
    """The stability threshold of an optimizer with its present learning rate, momentum, weight decay and radius.

    Args:
        optimizer: SGD, Adam, AdamW, RMSprop or Adagrad of torch, or SAM around SGD.
        gradient: of the full loss, or its norm, which normalised SAM needs: ``h.gradient()``.

    Raises:
        UsageError: there is no formula for the optimizer, or `gradient` is missing.
    """
    found = [_edge(optimizer, group, gradient) for group in base_of(optimizer).param_groups]
    return min(found, key=lambda edge: edge.threshold)


def sam_edge(lr: float, rho: float, gradient_norm: float) -> float:
    """The SAM-edge of gradient descent with normalised SAM, 2/lr without a radius."""
    return _perturbed(2 / lr, rho / gradient_norm) if rho else 2 / lr


def _edge(optimizer: Optimizer, group: dict[str, Any], gradient: Tensor | float | None) -> Edge:
    base, lr = base_of(optimizer), float(group["lr"])
    require(lr > 0, f"lr must be > 0 for an edge, got {lr}")
    decay = float(group.get("weight_decay") or 0)
    rho = float(group.get("rho") or 0) if base is not optimizer else 0.0
    if isinstance(base, SGD):
        threshold, formula = _of_sgd(group, lr, decay)
        return Edge(*_with_sam(threshold, formula, group, rho, gradient), curvature="hessian", decay=0.0)
    require(rho == 0, f"the edge of SAM is known around SGD, got {type(base).__name__}; use SGD, or rho=0")
    if isinstance(base, AdamW) or (isinstance(base, Adam) and group.get("decoupled_weight_decay")):
        beta = float(group["betas"][0])
        text = "(1 + β₁)(2/lr − decay)/(1 − β₁)" if decay else "(2 + 2β₁)/((1 − β₁) lr)"
        return Edge((1 + beta) * (2 / lr - decay) / (1 - beta), text, curvature="preconditioned", decay=0.0)
    if isinstance(base, Adam):
        beta, text = float(group["betas"][0]), "(2 + 2β₁)/((1 − β₁) lr)"
        return Edge((2 + 2 * beta) / ((1 - beta) * lr), text, curvature="preconditioned", decay=decay)
    if isinstance(base, RMSprop):
        beta = float(group["momentum"])
        text = "(2 + 2β)/lr" if beta else "2/lr"
        return Edge((2 + 2 * beta) / lr, text, curvature="preconditioned", decay=decay)
    if isinstance(base, Adagrad):
        return Edge(2 / lr, "2/lr", curvature="preconditioned", decay=decay)
    raise UsageError(
        f"optimizer must be SGD, Adam, AdamW, RMSprop, Adagrad, or SAM around SGD, got {type(base).__name__}, whose "
        "edge is not known"
    )


def _of_sgd(group: dict[str, Any], lr: float, decay: float) -> tuple[float, str]:
    beta, dampening = float(group["momentum"]), float(group["dampening"])
    less = " − decay" if decay else ""
    if group["nesterov"]:
        return (2 + 2 * beta) / (lr * (1 + 2 * beta)) - decay, f"(2 + 2β)/(lr (1 + 2β)){less}"
    if beta:
        damped = " (1 − dampening)" if dampening else ""
        return (2 + 2 * beta) / (lr * (1 - dampening)) - decay, f"(2 + 2β)/(lr{damped}){less}"
    return 2 / lr - decay, f"2/lr{less}"


def _with_sam(
    threshold: float, formula: str, group: dict[str, Any], rho: float, gradient: Tensor | float | None
) -> tuple[float, str]:
    """The threshold of SAM around an optimizer with this one: where lambda (1 + rho lambda) reaches it."""
    if not rho:
        return threshold, formula
    require(not group["adaptive"], "the edge of SAM is known with adaptive=False, got True")
    if not group["normalize"]:
        return _perturbed(threshold, rho), f"(√(1 + 4ρT) − 1)/(2ρ), T = {formula}"
    if gradient is None:
        raise UsageError("gradient must be given for the edge of normalised SAM, got None; pass h.gradient()")
    norm = float(gradient.detach().norm()) if isinstance(gradient, Tensor) else float(gradient)
    require(0 < norm < math.inf, f"the norm of gradient must be > 0 and finite, got {norm}")
    return _perturbed(threshold, rho / norm), f"(√(1 + 4ρT/|g|) − 1)|g|/(2ρ), T = {formula}"


def _perturbed(threshold: float, rho: float) -> float:
    """The positive root of rho x^2 + x = threshold."""
    return 2 * threshold / (math.sqrt(1 + 4 * rho * threshold) + 1)
