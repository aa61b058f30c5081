"""Sharpness-aware minimization: step with the gradient found uphill.

A step takes two gradients. The first, g at the weights w, gives a perturbation epsilon towards higher loss.
The second is taken at w + epsilon, and with it the base optimizer steps from w.

    SAM                epsilon = rho g / ‖g‖             Foret et al. 2021, arXiv 2010.01412
    adaptive=True      epsilon = rho |w|² g / ‖|w| g‖    ASAM, Kwon et al. 2021, arXiv 2102.11600
    normalize=False    the same without the division     Andriushchenko, Flammarion 2022, arXiv 2206.06232

The norm runs over all parameters at once, in float32 or wider. Weight decay is the base optimizer's and has
no part in epsilon. Where the base optimizer maximizes, epsilon points downhill.

Limits: gradients must be dense, and a half-precision weight loses a perturbation below its rounding.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

Closure = Callable[[], Tensor]
TensorList = list[Tensor] | tuple[Tensor, ...]
# A parameter group, with its weights and their gradients that share one device and dtype.
Bucket = tuple[dict[str, Any], list[Tensor], list[Tensor]]
# A module that gets and sets a random state, the device it does so for if it has several, and the state.
RandomState = tuple[Any, tuple[torch.device, ...], Tensor]


class SAM(Optimizer):
    """SAM over any torch optimizer that steps without a closure.

    ::

        optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, model=model, lr=0.1, momentum=0.9)

        def closure():
            loss = criterion(model(inputs), targets)
            loss.backward()
            return loss

        loss = optimizer.step(closure)

    `param_groups` and `state` are the base optimizer's own, so schedulers and checkpoints work as on any
    optimizer. A group may set its own `rho`, `adaptive` and `normalize`. Only the first pass may change the
    buffers of `model`, such as batch-norm statistics; without `model` both passes change them. A step whose
    first or second gradient is not finite leaves weights and state as they were, and adds one to `skipped`.
    With `rho=0` in every group this is the base optimizer, bit for bit and in one pass. With `m` each m closures of a
    list have a perturbation of their own (m-SAM, as Foret et al. train on several accelerators); else all share one.
    `max_norm` clips the gradient that the base optimizer steps with, not the one that perturbs. With a `scaler`
    closures run ``scaler.scale(loss).backward()`` and return the loss; the scaler steps, skips and updates in `step`.
    With DistributedDataParallel every process perturbs by the mean gradient of all, or with ``no_sync=ddp.no_sync`` by
    its own, and then the result depends on how many there are.
    """

    skipped = 0
    no_sync: Callable[[], AbstractContextManager[Any]] | None = None  # belongs to a process, so copies have none
    # In a pickle, beside the optimizer's own:
    _kept: tuple[str, ...] = ("base_optimizer", "model", "m", "max_norm", "scaler", "skipped")
    _perturbed: list[list[Tensor]] | None = None  # weights between first_step and second_step, by bucket
    _copies: Sequence[list[Tensor]] = ()  # what they were; the memory is kept from step to step
    _first_norm: Tensor

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer],
        rho: float = 0.05,
        *,
        adaptive: bool = False,
        normalize: bool = True,
        model: nn.Module | None = None,
        m: int | None = None,
        max_norm: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
        no_sync: Callable[[], AbstractContextManager[Any]] | None = None,
        **base_kwargs: Any,
    ) -> None:
        if not (m is None or (isinstance(m, int) and m >= 1)):
            raise ValueError(f"m must be the number of closures that share a perturbation, >= 1, got {m!r}")
        if not (max_norm is None or 0 < max_norm < math.inf):
            raise ValueError(f"max_norm must be > 0 and finite, got {max_norm!r}")
        if not (isinstance(base_optimizer, type) and issubclass(base_optimizer, Optimizer)):
            kind = type(base_optimizer).__name__
            raise ValueError(f"base_optimizer must be an optimizer class, got a {kind}; pass torch.optim.SGD")
        name = base_optimizer.__name__
        if issubclass(base_optimizer, torch.optim.LBFGS):
            raise ValueError(f"base_optimizer must step without a closure, got {name}; use SGD or Adam")
        if not (model is None or isinstance(model, nn.Module)):
            kind = type(model).__name__
            raise ValueError(f"model must be a torch.nn.Module, got a {kind}; pass the network itself")
        base = base_optimizer(params, **base_kwargs)
        own = {"rho": rho, "adaptive": adaptive, "normalize": normalize}
        if clash := sorted(own.keys() & base.defaults.keys()):
            raise ValueError(f"base_optimizer must not have a {clash[0]}, got {name}; use SGD or Adam")
        super().__init__(base.param_groups, {**base.defaults, **own})
        self.base_optimizer = base
        self.model, self.m, self.max_norm, self.scaler, self.no_sync = model, m, max_norm, scaler, no_sync
        self.param_groups, self.state = base.param_groups, base.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as on any optimizer; it may set its own rho, adaptive and normalize."""
        rho = param_group.get("rho", self.defaults["rho"])
        if not (isinstance(rho, (int, float)) and 0 <= rho < math.inf):
            raise ValueError(f"rho must be >= 0 and finite, got {rho!r}; use rho=0 for the base optimizer")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Closure | Sequence[Closure] | None = None) -> Tensor:  # type: ignore[override]
        """Run both passes, step, and return the loss of the first.

        A closure runs forward and backward on one batch and returns its loss. The gradients are zeroed before
        each pass; a lone closure may do so too. A list of closures is one batch in micro-batches of equal
        weight: losses and gradients are averaged over it. The second pass replays the state of torch's
        default random generators; an exception in it restores the weights.
        """
        closures = self._checked(closure)
        if self._plain():
            loss = self._run(closures)
            if self.max_norm is None and self.scaler is None:
                self.base_optimizer.step()
                return loss
            self._first_norm = torch.zeros(())
        else:
            loss = self._both_passes(closures)
        self._descend(self._gradients())
        return loss

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Perturb the weights by the gradients of a first pass.

        Until `second_step`, random state and buffers are in the caller's hands.
        """
        if self._perturbed is not None:
            raise RuntimeError("first_step was called twice; call second_step, or zero_grad and second_step")
        if self.scaler:
            raise RuntimeError("first_step cannot unscale gradients; call step(closure), or unscale and pass no scaler")
        self._ascend()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Restore the weights, and step with the gradients of a second pass."""
        if self._perturbed is None:
            raise RuntimeError("second_step was called before first_step; call first_step between the passes")
        self._restore()
        self._descend(self._gradients())
        if zero_grad:
            self.zero_grad()

    def _plain(self) -> bool:
        """Whether this is the base optimizer."""
        return not any(group["rho"] for group in self.param_groups)

    def _checked(self, closure: Any) -> Sequence[Closure]:
        closures: Sequence[Any] = closure if isinstance(closure, (list, tuple)) else [closure]
        if not (closures and all(callable(c) for c in closures)):
            raise ValueError(
                "closure must be a function that runs backward and returns the loss, or a list of them, "
                f"got {type(closure).__name__}; to run the passes yourself use first_step and second_step"
            )
        return closures

    def _both_passes(self, closures: Sequence[Closure]) -> Tensor:
        """Leave the gradient to descend by in `.grad`, and return the loss of the first pass.

        With m, each m closures have a perturbation of their own, and their gradients are averaged.
        """
        m = self.m or len(closures)
        if m >= len(closures):
            return self._perturbed_gradient(closures)
        weights = self._weights()
        total: list[Tensor | None] = [None] * len(weights)
        losses, norms = [], []
        for start in range(0, len(closures), m):
            part = closures[start : start + m]
            losses.append(self._perturbed_gradient(part) * (len(part) / len(closures)))
            norms.append(self._first_norm)
            for i, weight in enumerate(weights):
                if weight.grad is not None:
                    share = weight.grad * (len(part) / len(closures))
                    total[i] = share if total[i] is None else total[i] + share
        for weight, grad in zip(weights, total, strict=True):
            weight.grad = grad
        self._first_norm = torch.stack([norm.to(norms[0].device) for norm in norms]).sum()
        return torch.stack(losses).sum()

    def _perturbed_gradient(self, closures: Sequence[Closure]) -> Tensor:
        """Both passes over one batch: leave the gradient at w + epsilon in `.grad`, and return the loss at w."""
        random_state = self._random_state()
        with self.no_sync() if self.no_sync else nullcontext():
            loss = self._run(closures)
        with self._kept_buffers():
            try:
                self._ascend()
                for generator, where, state in random_state:
                    generator.set_rng_state(state, *where)
                self._run(closures)
            finally:
                self._restore()
        return loss

    def _ascend(self) -> None:
        """Add epsilon to the weights, with the gradients of the first pass at hand. Variants differ here."""
        self._perturb(self._gradients())

    def _run(self, closures: Sequence[Closure]) -> Tensor:
        """One pass: leave the mean gradient in `.grad`, return the mean loss."""
        weights = self._weights()
        for weight in weights:  # as zero_grad(), which takes longer to report itself to the profiler
            weight.grad = None
        with torch.enable_grad():
            losses = [closure() for closure in closures]
        for loss in losses:
            if not isinstance(loss, Tensor):
                raise ValueError(f"closure must return its loss, a tensor, got {type(loss).__name__}")
        if len(losses) > 1 or self.scaler:
            grads = [weight.grad for weight in weights if weight.grad is not None]
            if grads:
                torch._foreach_div_(grads, len(losses) * self._scale(grads[0]))
        return losses[0].detach() if len(losses) == 1 else torch.stack(losses).mean()

    def _scale(self, like: Tensor) -> Any:
        """What the scaler multiplies losses by: a number on the device, which nobody waits for; 1 without a scaler."""
        return self.scaler.scale(like.new_ones(())) if self.scaler else 1

    def _gradients(self) -> list[Bucket]:
        """The weights that have a gradient, with it in float32 or wider."""
        buckets: list[Bucket] = []
        for group in self.param_groups:
            kinds: dict[Any, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
            for weight in group["params"]:
                grad = weight.grad
                if grad is None:
                    continue
                if grad.layout != torch.strided:
                    raise ValueError(f"gradients must be dense, got {grad.layout}; use sparse=False")
                weights, grads = kinds[weight.device, weight.dtype]
                weights.append(weight)
                grads.append(grad.float() if grad.dtype in (torch.float16, torch.bfloat16) else grad)
            buckets += [(group, weights, grads) for weights, grads in kinds.values()]
        return buckets

    def _perturb(self, buckets: list[Bucket]) -> None:
        """Save the weights and add epsilon to them."""
        self._save([weights for _, weights, _ in buckets])
        self._first_norm = self._add(buckets)

    def _save(self, weights: list[list[Tensor]]) -> None:
        """Keep copies of the weights, for `_restore`."""
        old: list[list[Tensor]] = [*self._copies, *([] for _ in weights)]
        self._copies = [_copied(bucket, copies) for bucket, copies in zip(weights, old, strict=False)]
        self._perturbed = weights

    def _add(self, buckets: list[Bucket], rho: float | None = None) -> Tensor:
        """Add epsilon to the weights, with the radius of their group if none is given; return the norm divided by."""
        directions = [
            torch._foreach_mul(grads, torch._foreach_abs(weights)) if group["adaptive"] else grads
            for group, weights, grads in buckets
        ]
        norm = _norm(directions)
        # A norm so small that its squares underflow is not to be trusted; a zero gradient stays zero.
        numbers = torch.finfo(norm.dtype)
        divisor = norm.clamp_min(math.sqrt(numbers.tiny / numbers.eps))
        for (group, weights, _), direction in zip(buckets, directions, strict=True):
            if group["adaptive"]:
                direction = torch._foreach_mul(direction, torch._foreach_abs(weights))
            radius = group["rho"] if rho is None else rho
            radius = -radius if group.get("maximize") else radius
            if group["normalize"]:
                divisors = [divisor.to(weights[0].device)] * len(weights)
                torch._foreach_addcdiv_(weights, direction, divisors, value=radius)
            else:
                torch._foreach_add_(weights, direction, alpha=radius)
        return norm

    def _restore(self) -> None:
        """Copy the saved weights back, in place: subtracting epsilon would round."""
        for weights, copies in zip(self._perturbed or [], self._copies, strict=False):
            torch._foreach_copy_(weights, copies)
        self._perturbed = None

    def _descend(self, buckets: list[Bucket]) -> None:
        """Let the base optimizer step, if both gradients are finite."""
        norm = _norm([grads for _, _, grads in buckets])
        if self.max_norm is not None:
            for _, weights, _ in buckets:
                shrink = (self.max_norm / norm.clamp_min(self.max_norm)).to(weights[0].device)
                grads: list[Any] = [weight.grad for weight in weights]
                torch._foreach_mul_(grads, shrink)
        # The one wait for the device in a step, hence after both passes. It cannot be left to the device: the
        # base optimizer keeps part of its state on the host.
        finite = math.isfinite(norm + self._first_norm.to(norm.device))
        if self.scaler:
            self._scaled_step(self.scaler, finite)
        elif finite:
            self.base_optimizer.step()
        if finite:
            self._stepped()
        else:
            self.skipped += 1
        self._opt_called = True  # a scheduler warns if no step came before its own

    def _scaled_step(self, scaler: torch.amp.GradScaler, finite: bool) -> None:
        """Let the scaler step or skip, and adapt its scale: it wants gradients that it has unscaled itself."""
        grads: list[Tensor] = [weight.grad for weight in self._weights() if weight.grad is not None]
        if grads:
            torch._foreach_mul_(grads, self._scale(grads[0]))
            if not finite:  # what the first gradient had need not show in the second
                grads[0].fill_(math.nan)
            scaler.step(self.base_optimizer)
            scaler.update()

    def _stepped(self) -> None:
        """The base optimizer has stepped. Variants keep what they need for the next step."""

    def _random_state(self) -> list[RandomState]:
        """The state of torch's default generators, on the CPU and on the devices of the weights."""
        generators: list[tuple[Any, tuple[torch.device, ...]]] = [(torch, ())]
        for device in {weight.device for group in self.param_groups for weight in group["params"]}:
            if device.type != "cpu":
                where = () if device.type == "mps" else (device,)
                generators.append((torch.get_device_module(device), where))
        return [(module, where, module.get_rng_state(*where)) for module, where in generators]

    @contextmanager
    def _kept_buffers(self) -> Iterator[None]:
        """The buffers of the model, such as batch-norm statistics, are put back behind the pass inside."""
        kept = [
            (module, name, buffer, buffer.clone())
            for module in (self.model.modules() if self.model is not None else ())
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        try:
            yield
        finally:
            for module, name, buffer, value in kept:
                setattr(module, name, buffer)  # a module may have put another tensor there
                buffer.copy_(value)

    def _weights(self) -> list[Any]:
        return [weight for group in self.param_groups for weight in group["params"]]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self._kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a loaded or unpickled state, and share it with the base optimizer again."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name in ("rho", "adaptive", "normalize"):  # not in a checkpoint of the base optimizer alone
                group.setdefault(name, self.defaults[name])
        self.base_optimizer.__setstate__({"state": self.state, "param_groups": self.param_groups})


def _copied(weights: list[Tensor], old: list[Tensor]) -> list[Tensor]:
    """Copies of the weights, over old ones that fit: on a CPU fresh memory costs more than the copying."""
    if not old or _kind(weights) != _kind(old):
        return list(torch._foreach_clone(weights))
    torch._foreach_copy_(old, weights)
    return old


def _kind(tensors: list[Tensor]) -> Any:
    return tensors[0].device, tensors[0].dtype, [tensor.shape for tensor in tensors]


def _norm(gradients: Sequence[TensorList]) -> Tensor:
    """The Euclidean norm of all gradients together."""
    norms = [norm for grads in gradients for norm in torch._foreach_norm(grads)]
    if not norms:
        return torch.zeros(())
    if len(gradients) > 1:
        norms = [norm.to(norms[0].device) for norm in norms]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total
