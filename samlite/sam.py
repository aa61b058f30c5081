"""Sharpness-aware minimization: step with the gradient found uphill.

One step takes two gradients. The first, g at w, gives a perturbation epsilon towards higher loss; the second is taken
at w + epsilon, and with it the base optimizer steps from w.

    SAM                 epsilon = rho g / ‖g‖              Foret et al. 2021, arXiv 2010.01412
    adaptive (ASAM)     epsilon = rho |w|² g / ‖|w| g‖     Kwon et al. 2021, arXiv 2102.11600
    normalize=False     epsilon = rho g, or rho |w|² g     Andriushchenko and Flammarion 2022, arXiv 2206.06232

The norm runs over all parameters at once, in float32 or wider. Weight decay belongs to the base optimizer and has no
part in epsilon. Where the base optimizer maximizes, the perturbation points downhill.

Limits: dense gradients only. Weights in half precision cannot hold a perturbation below their rounding. What a closure
keeps outside torch's default generators and the buffers of `model` is not wound back between the passes.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim.optimizer import Optimizer, ParamsT

Closure = Callable[[], Tensor | float]
# Weights of one group, device and dtype with their gradients: what one foreach call can take.
Bucket = tuple[dict[str, Any], list[Tensor], list[Tensor]]


def _nrm(b):
    return torch.linalg.vector_norm(torch.stack([n for g in b for n in torch._foreach_norm(g)]))


class SAM(Optimizer):
    """SAM over any torch optimizer: `SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)`.

    A closure runs forward and backward on one batch and returns its loss::

        def closure():
            loss = criterion(model(inputs), targets)
            loss.backward()
            return loss

        loss = optimizer.step(closure)

    Parameter groups may set their own `rho`, `adaptive` and `normalize`. `param_groups` and `state` are those of
    `base_optimizer` itself, so schedulers, `state_dict` and hooks work as on any optimizer. `rho=0` is exactly the base
    optimizer. If either gradient is not finite the weights and the base optimizer stay as they were, and `skipped`
    counts the step.

    `model` is the module whose buffers (batch-norm statistics) the second pass must not change; without it they are
    updated in both passes.
    """

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer],
        rho: float = 0.05,
        *,
        adaptive: bool = False,
        normalize: bool = True,
        model: torch.nn.Module | None = None,
        **base_kwargs: Any,
    ) -> None:
        if not (isinstance(base_optimizer, type) and issubclass(base_optimizer, Optimizer)):
            raise ValueError(
                f"base_optimizer must be an optimizer class, got {base_optimizer!r}; pass torch.optim.SGD and its arguments"
            )
        base = base_optimizer(params, **base_kwargs)
        own = {"rho": rho, "adaptive": adaptive, "normalize": normalize}
        self.model = model
        self.skipped = 0
        self._saved: list[tuple[list[Tensor], list[Tensor]]] | None = None
        super().__init__(base.param_groups, {**base.defaults, **own})
        self.base_optimizer = base
        self.param_groups, self.state = base.param_groups, base.state

    @torch.no_grad()
    def step(self, closure: Closure | Sequence[Closure] | None = None) -> Tensor | float:  # type: ignore[override]
        closures = list(closure) if isinstance(closure, Sequence) else [closure]
        generators = self._generators()
        start = [module.get_rng_state(*device) for module, device in generators]
        loss = self._run(closures)
        if not any(group["rho"] for group in self.param_groups):
            self.base_optimizer.step()
            return loss
        try:
            self.first_step()
            with self._second_pass(start):
                self._run(closures)
        except BaseException:
            self._restore()
            raise
        self.second_step()
        return loss

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        self._perturb(self._gradients())
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        self._restore()
        norm = _nrm([grads for _, _, grads in self._gradients()])
        if torch.isfinite(norm + self._norm.to(norm.device)):
            self.base_optimizer.step()
        else:
            self.skipped += 1
        if zero_grad:
            self.zero_grad()

    def _run(self, closures) -> Tensor | float:
        self.zero_grad()
        with torch.enable_grad():
            losses = [closure() for closure in closures]
        return sum(losses) / len(losses)

    def _gradients(self) -> list[Bucket]:
        buckets: dict[Any, Bucket] = {}
        for i, group in enumerate(self.param_groups):
            for w in group["params"]:
                g = w.grad
                if g is not None:
                    _, weights, grads = buckets.setdefault((i, w.device, w.dtype), (group, [], []))
                    weights.append(w)
                    grads.append(g.float() if g.dtype in (torch.float16, torch.bfloat16) else g)
        return list(buckets.values())

    def _perturb(self, buckets: list[Bucket]) -> None:
        scaled = [
            torch._foreach_mul(torch._foreach_abs(weights), grads) if group["adaptive"] else grads
            for group, weights, grads in buckets
        ]
        self._norm = _nrm(scaled)
        self._saved = [(weights, torch._foreach_clone(weights)) for _, weights, _ in buckets]
        for (group, weights, _), d in zip(buckets, scaled, strict=True):
            if group["adaptive"]:
                d = torch._foreach_mul(torch._foreach_abs(weights), d)
            if group["normalize"]:
                d = torch._foreach_mul(d, self._norm.to(weights[0].device).clamp_min(torch.finfo(self._norm.dtype).tiny).reciprocal())
            torch._foreach_add_(weights, d, alpha=group["rho"])

    def _restore(self) -> None:
        for weights, values in self._saved or []:
            torch._foreach_copy_(weights, values)
        self._saved = None

    def _generators(self):
        devices = {w.device for group in self.param_groups for w in group["params"]}
        return [(torch, ())]

    @contextmanager
    def _second_pass(self, start) -> Iterator[None]:
        generators = self._generators()
        left = [module.get_rng_state(*device) for module, device in generators]
        for (module, device), state in zip(generators, start, strict=True):
            module.set_rng_state(state, *device)
        buffers = [(m._buffers, dict(m._buffers)) for m in self.model.modules() if m._buffers] if self.model else []
        values = [b.clone() for _, d in buffers for b in d.values()]
        try:
            yield
        finally:
            for (module, device), state in zip(generators, left, strict=True):
                module.set_rng_state(state, *device)
            for b, v in zip([b for _, d in buffers for b in d.values()], values):
                b.copy_(v)
