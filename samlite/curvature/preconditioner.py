"""The diagonal by which an optimizer divides its steps, and curvature as the optimizer feels it.

Cohen et al., "Adaptive gradient methods at the edge of stability" (2022), arXiv 2207.14484: preconditioned gradient
descent is as stable as the largest eigenvalue of P^-1 H, which is that of the symmetric P^-1/2 H P^-1/2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adagrad, Adam, AdamW, Optimizer, RMSprop

from samlite.batches import described
from samlite.curvature.compiled import compiled
from samlite.curvature.operator import Operator
from samlite.curvature.scaling import ldexp_block
from samlite.errors import UsageError, require

KINDS = (Adam, AdamW, RMSprop, Adagrad)


class Sandwich(Operator):
    """C (H + s I) C, with C symmetric: everything that an `Operator` has, in one product with H each.

    Args:
        inner: the operator H.
        factor: multiplies a vector (p,) by C.
        largest: a bound on the norm of C.
        shift: the number s.
    """

    def __init__(self, inner: Operator, factor: Callable[[Tensor], Tensor], largest: float, shift: float = 0.0) -> None:
        self.names, self.params, self.memory = inner.names, inner.params, inner.memory
        self.inner, self._factor, self._largest, self._shift = inner, factor, largest, shift

    @contextmanager
    def products(self) -> Iterator[Any]:
        """The compiled operator, for use within."""
        with self.inner.products() as operator:

            def product(v: Tensor) -> Tensor:
                inside = self._factor(v)
                inner = operator.apply(inside)
                exponent = operator.exponent()  # a number that is known after the first product
                inner = ldexp_block(inner, exponent) if exponent else inner
                return self._factor(inner.add(inside, alpha=self._shift) if self._shift else inner)

            yield compiled().Callable(product, self.params[0].detach(), self.shape[0])

    def precision(self) -> float:
        """See `Matrix.precision`."""
        return self.inner.precision()

    def product_errors(self, vectors: Tensor) -> list[float]:
        """See `Matrix.product_errors`."""
        if not self.inner.precision():
            return super().product_errors(vectors)
        inside = torch.stack([self._factor(v) for v in vectors])
        return [self._largest * error for error in self.inner.product_errors(inside)]

    def gradient_seconds(self) -> float:
        """Seconds of a full gradient."""
        return self.inner.gradient_seconds()


def preconditioned(inner: Operator, by: Optimizer | Tensor, decay: float = 0.0) -> Sandwich:
    """P^-1/2 (H + decay I) P^-1/2. See `Hessian.preconditioned`."""
    if isinstance(by, Tensor):
        p = inner.shape[0]
        require(by.shape == (p,), f"the diagonal must be of shape ({p},), got {described(by)}")
        diagonal = by.detach().to(inner.params[0])
    else:
        diagonal = preconditioner(by, inner.params)
    require(
        bool(((diagonal > 0) & diagonal.isfinite()).all()),
        f"the diagonal must be positive and finite, got values from {float(diagonal.min()):.3g}",
    )
    root = diagonal.rsqrt()
    return Sandwich(inner, root.mul, float(root.max()), decay)


def preconditioner(optimizer: Optimizer, params: Sequence[nn.Parameter]) -> Tensor:
    """P of the optimizer's last step, in the parameters' type: (p,). A step is -lr P^-1 times gradient or momentum.

    Adam, AdamW: (1 - beta1^t) (sqrt(v / (1 - beta2^t)) + eps), v the largest so far with amsgrad.
    RMSprop: sqrt(v) + eps, v less the squared mean gradient where centered.
    Adagrad: (1 + (t - 1) lr_decay) (sqrt(sum of squares) + eps).

    Raises:
        UsageError: the optimizer has no such diagonal, no state yet, or not these parameters.
    """
    base = base_of(optimizer)
    require(
        isinstance(base, KINDS),
        f"optimizer must be Adam, AdamW, RMSprop or Adagrad, or SAM around one, got {type(base).__name__}, whose steps "
        "have no diagonal; for SGD measure the Hessian itself",
    )
    groups = groups_of(base, params)
    parts = []
    for p in params:
        state = base.state.get(p, {})
        if not state or float(state.get("step", 0)) == 0:
            raise UsageError("optimizer must have taken a step with every measured parameter, got one without state")
        parts.append(_diagonal(base, groups[id(p)], state).detach().reshape(-1).to(params[0]))
    return torch.cat(parts)


def base_of(optimizer: Any) -> Optimizer:
    """The optimizer that steps: that inside SAM, or itself."""
    if not isinstance(optimizer, Optimizer):
        raise UsageError(f"optimizer must be a torch optimizer, got {described(optimizer)}")
    inner = getattr(optimizer, "base_optimizer", None)
    return inner if isinstance(inner, Optimizer) else optimizer


def groups_of(optimizer: Optimizer, params: Sequence[nn.Parameter]) -> dict[int, dict[str, Any]]:
    """The group of each parameter by its id. Raises UsageError where one of these has none."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    require(
        all(id(p) in groups for p in params),
        "optimizer must hold all measured parameters, got one without some; measure those that it holds by params=",
    )
    return groups


def _diagonal(base: Optimizer, group: dict[str, Any], state: dict[str, Any]) -> Tensor:
    eps, t = group["eps"], float(state["step"])
    if isinstance(base, Adam | AdamW):
        beta1, beta2 = map(float, group["betas"])
        v = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"].double() / (1 - beta2**t)
        factor = 1 - beta1**t
    elif isinstance(base, RMSprop):
        v, factor = state["square_avg"].double(), 1.0
        if group["centered"]:
            v = v - state["grad_avg"].double().square()
    else:
        v, factor = state["sum"].double(), 1 + (t - 1) * group["lr_decay"]
    diagonal: Tensor = (v.sqrt() + eps) * factor
    return diagonal
