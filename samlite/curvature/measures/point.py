"""What measures are taken of: a Hessian at its present weights, an optimizer there, and what several measures need."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from samlite.curvature.edges import Edge, edges
from samlite.curvature.moved import Moved
from samlite.curvature.operator import Operator
from samlite.curvature.preconditioner import base_of, preconditioned
from samlite.curvature.products import HessianProducts
from samlite.curvature.results import Eigenvalues, Kind
from samlite.curvature.updates import next_update
from samlite.errors import UsageError, require


class Value(NamedTuple):
    """A measured number and how far it can be trusted."""

    value: float
    error: float = 0.0
    kind: Kind = "exact"
    matvecs: int = 0  # beside those of `Point.top`
    converged: bool = True
    note: str = ""


@dataclass(frozen=True)
class Point:
    """A Hessian at its present weights, and how to measure there. Values that several measures need are kept."""

    hessian: HessianProducts
    optimizer: Optimizer | None = None
    given_lr: float | None = None
    given_rho: float | None = None
    radius: float = 0.05
    batch_size: int = 128
    batches: int = 1000
    """The most batches that a mean over them takes."""
    k: int = 5
    tol: float = 1e-3
    other: HessianProducts | None = None
    seed: int = 0

    @cached_property
    def moved(self) -> Moved:
        """The loss at other weights."""
        return self.hessian.moved()

    @cached_property
    def gradient(self) -> Tensor:
        """The full gradient (p,). Raises UsageError where it is 0 or not finite."""
        gradient = self.moved.gradient()
        require(bool(gradient.isfinite().all()), "the gradient must be finite, got nan or inf in it")
        require(bool(gradient.any()), "the gradient is 0 here")
        return gradient

    @cached_property
    def update(self) -> tuple[Tensor, float]:
        """The next update and its learning rate, see `next_update`."""
        update, lr = next_update(self.moved, self.optimizer)
        require(bool(update.any()), "the next update is 0 here")
        return update, self.given_lr if self.optimizer is None and self.given_lr else lr

    @cached_property
    def top(self) -> Eigenvalues:
        """The k largest eigenvalues and one more, which tells how far apart their space is from the rest."""
        k = min(self.k, self.hessian.shape[0])
        more = min(k + 1, self.hessian.shape[0])
        return self.hessian.eigenvalues(more, tol=self.tol, vectors=True, seed=self.seed, verify=True)

    def spaces(self, k: int) -> tuple[Tensor, float]:
        """(The k first eigenvectors (p, k), a bound on the sine of their angles to the true ones).

        Davis and Kahan: the residuals over the gap to the rest of the spectrum.
        """
        top = self.top
        assert top.vectors is not None
        if len(top.values) <= k:
            return top.vectors[:, :k], 0.0  # all of them
        gap = float(top.values[k - 1] - top.values[k] - top.errors[k])
        residual = float(top.residuals[:k].norm())
        return top.vectors[:, :k], residual / gap if gap > residual else 1.0

    @property
    def lr(self) -> float:
        """The learning rate. Raises UsageError where none is known."""
        if self.given_lr:
            return self.given_lr
        if self.optimizer is None:
            raise UsageError("needs lr or an optimizer")
        return float(base_of(self.optimizer).param_groups[0]["lr"])

    @property
    def rho(self) -> float:
        """The radius of SAM. Raises UsageError where none is known."""
        if self.given_rho is not None:
            return self.given_rho
        rho = self.optimizer.param_groups[0].get("rho") if self.optimizer is not None else None
        if not rho:
            raise UsageError("needs rho, or an optimizer of the SAM family")
        return float(rho)

    @cached_property
    def edge(self) -> Edge:
        """The stability threshold of the optimizer. Raises UsageError where there is none."""
        if self.optimizer is None:
            require(bool(self.given_lr), "needs lr or an optimizer")
            return edges(torch.optim.SGD([torch.zeros(1)], lr=self.lr))
        return edges(self.optimizer, self.gradient if self.optimizer.param_groups[0].get("rho") else None)

    @cached_property
    def preconditioned(self) -> Operator:
        """The Hessian as the optimizer feels it, weight decay included where it is preconditioned, too."""
        if self.optimizer is None:
            raise UsageError("needs an optimizer that preconditions: Adam, AdamW, RMSprop or Adagrad")
        return preconditioned(self.hessian, self.optimizer, self._coupled_decay())

    def _coupled_decay(self) -> float:
        try:
            return self.edge.decay
        except UsageError:  # an optimizer without a known edge
            return 0.0

    def generator(self) -> torch.Generator:
        """Draws the same in every measure."""
        return torch.Generator(device="cpu").manual_seed(self.seed)
