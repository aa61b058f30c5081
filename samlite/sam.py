"""Sharpness-aware minimization: step with the gradient found uphill.

A step takes two gradients. The first, g at the weights w, gives a perturbation epsilon towards higher loss; the second
is taken at w + epsilon, and with it the base optimizer steps from w.

    SAM                epsilon = rho g / ‖g‖             Foret et al. 2021, arXiv 2010.01412
    adaptive=True      epsilon = rho |w|² g / ‖|w| g‖    ASAM, Kwon et al. 2021, arXiv 2102.11600
    normalize=False    the same without the division     Andriushchenko and Flammarion 2022, arXiv 2206.06232

The norm runs over all parameters at once, in float32 or wider. Weight decay is the base optimizer's and has no part in
epsilon. Where the base optimizer maximizes, epsilon points downhill.

Limits: gradients must be dense. A weight in half precision cannot hold a perturbation below its rounding.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

Closure = Callable[[], Tensor]
# A parameter group, and those of its weights with their gradients that share a device and a dtype.
Bucket = tuple[dict[str, Any], list[Tensor], list[Tensor]]


class SAM(Optimizer):
    """SAM over any torch optimizer that steps without a closure.

    ::

        optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, model=model, lr=0.1, momentum=0.9)

        def closure():
            loss = criterion(model(inputs), targets)
            loss.backward()
            return loss

        loss = optimizer.step(closure)

    Parameter groups may set their own `rho`, `adaptive` and `normalize`. `param_groups` and `state` are the base
    optimizer's own, so schedulers and checkpoints work as on any optimizer, and `rho=0` is the base optimizer bit for
    bit. Only the first pass may change the buffers of `model`, such as batch-norm statistics; without `model` both
    passes change them. A step whose first or second gradient is not finite leaves the weights and the state as they
    were, and adds one to `skipped`.
    """

    skipped = 0
    # Between first_step and second_step: perturbed weights, and their values before.
    _saved: list[tuple[list[Tensor], list[Tensor]]] | None = None

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer],
        rho: float = 0.05,
        *,
        adaptive: bool = False,
        normalize: bool = True,
        model: nn.Module | None = None,
        **base_kwargs: Any,
    ) -> None:
        if not (isinstance(base_optimizer, type) and issubclass(base_optimizer, Optimizer)):
            raise ValueError(
                f"base_optimizer must be an optimizer class, got {base_optimizer!r}; "
                "pass a class such as torch.optim.SGD, and its arguments as keywords"
            )
        if model is not None and not isinstance(model, nn.Module):
            raise ValueError(f"model must be a torch.nn.Module, got {model!r}; omit it to let both passes change buffers")
        name = base_optimizer.__name__
        if issubclass(base_optimizer, torch.optim.LBFGS):
            raise ValueError(f"base_optimizer must step without a closure, got {name}; use SGD or Adam")
        base = base_optimizer(params, **base_kwargs)
        own = {"rho": rho, "adaptive": adaptive, "normalize": normalize}
        if clash := sorted(own.keys() & base.defaults.keys()):
            raise ValueError(f"base_optimizer must not have a {clash[0]} of its own, got {name}; use SGD or Adam")
        super().__init__(base.param_groups, {**base.defaults, **own})
        self.base_optimizer = base
        self.model = model
        self.param_groups, self.state = base.param_groups, base.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as on any optimizer; it may set its own rho, adaptive and normalize."""
        rho = param_group.get("rho", self.defaults["rho"])
        if not (isinstance(rho, (int, float)) and 0 <= rho < math.inf):
            raise ValueError(f"rho must be a finite number >= 0, got {rho!r}; use rho=0 for the base optimizer")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Closure | Sequence[Closure] | None = None) -> Tensor:  # type: ignore[override]
        """Run both passes, step, and return the loss of the first.

        A closure runs forward and backward on one batch and returns its loss. Gradients are zeroed before each pass.
        A list of closures is one batch in micro-batches of equal weight: gradients and losses are averaged, and a
        closure must not zero the gradients. The second pass replays the state of torch's default random generators; an
        exception in it restores the weights.
        """
        closures = closure if isinstance(closure, Sequence) else [closure]
        if not closures or not all(map(callable, closures)):
            raise ValueError(
                f"closure must be a function that runs backward and returns the loss, or a list of them, got {closure!r}; "
                "to run both passes yourself, call first_step and second_step"
            )
        random_state = self._random_state()
        loss = self._run(closures)
        if not any(group["rho"] for group in self.param_groups):
            self.base_optimizer.step()
            return loss
        try:
            self._perturb(self._gradients())
            with self._second_pass(random_state):
                self._run(closures)
            self._descend()
        except BaseException:  # Ctrl-C too
            self._restore()
            raise
        return loss

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Perturb the weights by the gradients of a first pass, which are used up.

        Random state and buffers are the caller's to keep.
        """
        self._perturb(self._gradients())
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Restore the weights, and step with the gradients of a second pass."""
        self._descend()
        if zero_grad:
            self.zero_grad()

    def _run(self, closures: Sequence[Closure]) -> Tensor:
        """One pass: the mean gradient in `.grad`, the mean loss returned."""
        for group in self.param_groups:
            for weight in group["params"]:
                weight.grad = None
        with torch.enable_grad():
            losses = [closure() for closure in closures]
        if any(loss is None for loss in losses): raise
        if len(losses) == 1:
            return losses[0]
        torch._foreach_div_([w.grad for group in self.param_groups for w in group["params"] if w.grad is not None], len(losses))
        return sum(losses) / len(losses)

    def _gradients(self) -> list[Bucket]:
        buckets = []
        for group in self.param_groups:
            kinds = defaultdict(lambda: ([], []))
            for weight in group["params"]:
                grad = weight.grad
                if grad is None:
                    continue
                if grad.layout != torch.strided:
                    raise ValueError(f"gradients must be dense, got {grad.layout}; use sparse=False in the embedding")
                weights, grads = kinds[weight.device, weight.dtype]
                weights.append(weight)
                grads.append(grad.float() if grad.dtype in (torch.float16, torch.bfloat16) else grad)
            buckets += [(group, *lists) for lists in kinds.values()]
        return buckets

    def _perturb(self, buckets: list[Bucket]) -> None:
        for group, weights, grads in buckets:
            if group["adaptive"]:
                torch._foreach_mul_(grads, torch._foreach_abs(weights))
        self._first_norm = norm = _norm(buckets)
        self._saved = [(weights, torch._foreach_clone(weights)) for _, weights, _ in buckets]
        inverse = norm.clamp_min(torch.finfo(norm.dtype).tiny).reciprocal()
        for group, weights, grads in buckets:
            if group["adaptive"]:
                torch._foreach_mul_(grads, torch._foreach_abs(weights))
            if group["normalize"]:
                torch._foreach_mul_(grads, inverse.to(weights[0].device))
            torch._foreach_add_(weights, grads, alpha=-group["rho"] if group.get("maximize") else group["rho"])

    def _restore(self) -> None:
        for weights, values in self._saved or []:
            torch._foreach_copy_(weights, values)
        self._saved = None

    def _descend(self):
        self._restore()
        norm = _norm(self._gradients())
        if math.isfinite(norm + self._first_norm.to(norm.device)):
            self.base_optimizer.step()
        else:
            self.skipped += 1
        self._opt_called = True

    def _random_state(self):
        devices = {w.device for group in self.param_groups for w in group["params"]}
        states = [(torch.set_rng_state, torch.get_rng_state())]
        for device in devices:
            if device.type != "cpu":
                module = torch.get_device_module(device)
                states.append((partial(module.set_rng_state, device=device), module.get_rng_state(device)))
        return states

    @contextmanager
    def _second_pass(self, start):
        end = self._random_state()
        kept = [] if self.model is None else [(m._buffers, dict(m._buffers)) for m in self.model.modules() if m._buffers]
        tensors = [b for _, buffers in kept for b in buffers.values() if b is not None]
        values = [t.clone() for t in tensors]
        for set_state, state in start:
            set_state(state)
        try:
            yield
        finally:
            for set_state, state in end:
                set_state(state)
            for live, buffers in kept:
                live.update(buffers)
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)


def _norm(buckets):
    norms = [n for _, _, grads in buckets for n in torch._foreach_norm(grads)]
    if len(buckets) > 1: norms = [n.to(norms[0].device) for n in norms]
    return torch.linalg.vector_norm(torch.stack(norms))
