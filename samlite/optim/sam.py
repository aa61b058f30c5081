"""Sharpness-aware minimization: step with the gradient found uphill.

A step takes two gradients. The first, g at the weights w, gives a perturbation epsilon towards higher loss.
The second is taken at w + epsilon, and with it the base optimizer steps from w.

    SAM                epsilon = rho g / ‖g‖             Foret et al. 2021, arXiv 2010.01412
    adaptive=True      epsilon = rho |w|² g / ‖|w| g‖    ASAM, Kwon et al. 2021, arXiv 2102.11600
    normalize=False    the same without the division     Andriushchenko, Flammarion 2022, arXiv 2206.06232

The norm runs over all parameters at once, in float32 or wider, and over all shards of a DTensor. Weight decay is
applied by the base optimizer; it does not enter epsilon. Where the base optimizer maximizes, epsilon points downhill.

Limits: gradients must be dense, and a half-precision weight loses a perturbation below its rounding.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT
from torch.utils.hooks import RemovableHandle

from samlite.optim.passes import Guard, buffers_of, leaves_of, put_back, random_state, replay
from samlite.optim.perturbation import Bucket, Snapshot, climb_, gradients_of, norm_of, shards_of
from samlite.optim.wrapper import OPTIONS, Wrapper, made

Closure = Callable[[], Tensor]
# An optimizer class, with some of its arguments perhaps, or an optimizer of the same weights.
Base = type[Optimizer] | partial[Any] | Optimizer


class SAM(Wrapper):
    """SAM over any torch optimizer that steps without a closure.

    ```python
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, model=model, lr=0.1, momentum=0.9)

    def closure():
        loss = criterion(model(inputs), targets)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    ```

    The base optimizer is a class, whose arguments follow, a `functools.partial` of one, or an optimizer of the same
    weights. `param_groups` and `state` are the base optimizer's own, so schedulers and checkpoints work as on any
    optimizer. A group may set its own `rho`, `adaptive` and `normalize`. Only the first pass may change the
    buffers of `model`, such as batch-norm statistics; without `model` both passes change them. A step whose
    first or second gradient is not finite leaves weights, state and the buffers of `model` as they were, and adds
    one to `skipped`.
    With `rho=0` in every group this is the base optimizer, bit for bit and in one pass. With `m` each m closures of a
    list have a perturbation of their own (m-SAM, as Foret et al. train on several accelerators); else all share one.
    `max_norm` clips the gradient that the base optimizer steps with, not the one that perturbs. With a `scaler`
    closures run ``scaler.scale(loss).backward()`` and return the loss; the scaler steps, skips and updates in `step`.
    With DistributedDataParallel every process perturbs by the mean gradient of all, or with ``no_sync=ddp.no_sync`` by
    its own, and then the result depends on how many there are. Weights that `fully_shard` has sharded are perturbed
    shard by shard, with the norm over all of them.
    """

    skipped = 0
    no_sync: Callable[[], AbstractContextManager[Any]] | None = None  # belongs to a process, so copies have none
    # In a pickle, beside the optimizer's own:
    _kept = (*Wrapper._kept, "model", "m", "max_norm", "scaler", "skipped")
    _guards: Sequence[RemovableHandle] = ()  # of model, between first_step and second_step
    _had_gradients = False  # whether a pass has left any weight a gradient
    _first_norm: Tensor

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: Base,
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
        if not (model is None or isinstance(model, nn.Module)):
            name = type(model).__name__
            raise ValueError(f"model must be a torch.nn.Module, got a {name}; pass the network itself")
        base = made(base_optimizer, params, base_kwargs)
        own = dict(zip(OPTIONS, (rho, adaptive, normalize), strict=True))
        if clash := sorted(own.keys() & base.defaults.keys()):
            raise ValueError(f"base_optimizer must not have a {clash[0]}, got {type(base).__name__}; use SGD or Adam")
        self.base_optimizer, self._snapshot = base, Snapshot()
        groups, state = base.param_groups, base.state
        super().__init__(groups, {**base.defaults, **own})  # starts with empty ones, and adds each group
        self.param_groups, self.state = groups, state
        self.model, self.m, self.max_norm, self.scaler, self.no_sync = model, m, max_norm, scaler, no_sync
        self._watch_loading()

    @torch.no_grad()
    def step(self, closure: Closure | Sequence[Closure] | None = None) -> Tensor:  # type: ignore[override]
        """Run both passes, step, and return the loss of the first.

        A closure runs forward and backward on one batch and returns its loss. The gradients are zeroed before
        each pass; a lone closure may do so too. A list of closures is one batch in micro-batches of equal
        weight: losses and gradients are averaged over it. The second pass replays the state of torch's
        default random generators; an exception in it restores the weights.
        """
        return self._step(closure)

    def _step(self, closure: Closure | Sequence[Closure] | None) -> Tensor:
        """Step, with gradients switched off: torch calls the hooks of an optimizer around `step` of every class."""
        if self._only_makes_state(closure):
            return self._make_state()
        closures = self._checked(closure)
        plain = self._plain()
        if plain and self.max_norm is None and self._scaler is None:
            loss = self._run(closures)
            with self._out_of_sight():
                self.base_optimizer.step()
            return loss
        with self._undone_if_skipped() if self.model is not None else nullcontext():
            if plain:
                loss = self._run(closures)
                self._first_norm = torch.zeros((), device="cpu")
            else:
                loss = self._both_passes(closures)
            self._descend(gradients_of(self.param_groups))
        return loss

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Perturb the weights by the gradients of a first pass.

        Until `second_step`, random state and buffers are in the caller's hands, and neither the optimizer nor `model`
        can be saved: the weights are perturbed.
        """
        if self._snapshot.taken:
            raise RuntimeError("first_step was called twice; call second_step, or zero_grad and second_step")
        if self._scaler:
            raise RuntimeError("first_step cannot unscale gradients; call step(closure), or unscale and pass no scaler")
        if all(weight.grad is None for weight in self._weights()):
            self._check_backward((), "first_step must come after backward", "before it")
        self._had_gradients = True
        try:
            self._ascend()
        except BaseException:
            self._restore()
            raise
        if self.model is not None:
            model: Any = self.model
            registers = (model.register_state_dict_pre_hook, model.register_load_state_dict_pre_hook)
            self._guards = [register(Guard()) for register in registers]
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Restore the weights, and step with the gradients of a second pass."""
        if not self._snapshot.taken:
            raise RuntimeError("second_step was called before first_step; call first_step between the passes")
        self._restore()
        self._descend(gradients_of(self.param_groups))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def restore(self) -> None:
        """Put the weights back without a step, as where the second pass has failed."""
        self._restore()

    def _plain(self) -> bool:
        """Whether this is the base optimizer."""
        return not any(group["rho"] for group in self.param_groups)

    def _checked(self, closure: Any) -> Sequence[Closure]:
        closures: Sequence[Any] = closure if isinstance(closure, (list, tuple)) else [closure]
        if not (closures and all(callable(c) for c in closures)):
            raise ValueError(
                "closure must be a function that runs backward and returns the loss, or a list of them, "
                f"got {type(closure).__name__}; after backward, three lines do the same: "
                "optimizer.first_step(zero_grad=True); loss_fn(model(x), y).backward(); optimizer.second_step(). "
                "With a GradScaler pass scaler=scaler to the optimizer, and call optimizer.step(closure) instead of "
                "scaler.step(optimizer)"
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
        states = random_state({weight.device for weight in self._weights()})
        with self.no_sync() if self.no_sync else nullcontext():
            loss = self._run(closures)
        with self._kept_buffers():
            try:
                self._ascend()
                replay(states)
                self._run(closures)
            finally:
                self._restore()
        return loss

    def _ascend(self) -> None:
        """Add epsilon to the weights, with the gradients of the first pass at hand. Variants differ here."""
        self._perturb(gradients_of(self.param_groups))

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
        if not any(weight.grad is not None for weight in weights):
            self._check_backward(losses, "closure must run backward", "in it")
        else:
            self._had_gradients = True
            if len(losses) > 1 or self._scaler:
                grads = shards_of([weight.grad for weight in weights if weight.grad is not None])
                torch._foreach_div_(grads, len(losses) * self._scale(grads[0]))
        return losses[0].detach() if len(losses) == 1 else torch.stack(losses).mean()

    def _check_backward(self, losses: Sequence[Tensor], rule: str, where: str) -> None:
        """Raise where no weight has a gradient because backward has not run.

        It has run where the loss depends on other weights only, and one of those has a gradient. A loss without a
        graph may be constant on this batch; but if there has been no gradient before, the closure has detached it.
        """
        weights = {weight for weight in self._weights() if weight.requires_grad}
        leaves = {leaf for loss in losses for leaf in leaves_of(loss)}
        ran = any(leaf.grad is not None for leaf in leaves) if leaves else self._had_gradients
        if weights and (not ran or leaves & weights):
            raise ValueError(f"{rule}, but no weight has a gradient; call loss.backward() {where}")

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        """The scaler, unless it is disabled: then it does nothing."""
        return self.scaler if self.scaler is not None and self.scaler.is_enabled() else None

    def _scale(self, like: Tensor) -> Any:
        """What the scaler multiplies losses by: a number on the device, which nobody waits for; 1 without a scaler."""
        return self._scaler.scale(like.new_ones(())) if self._scaler else 1

    def _perturb(self, buckets: list[Bucket]) -> None:
        """Save the weights and add epsilon to them."""
        self._snapshot.take([weights for _, weights, _ in buckets])
        self._first_norm = climb_(buckets)

    def _restore(self) -> None:
        """Put the saved weights back."""
        self._snapshot.put_back()
        for guard in self._guards:
            guard.remove()
        self._guards = []

    def _descend(self, buckets: list[Bucket]) -> None:
        """Let the base optimizer step, if both gradients are finite."""
        norm = norm_of(buckets, [shards_of(grads) for _, _, grads in buckets])
        if self.max_norm is not None:
            for _, weights, _ in buckets:
                shrink = (self.max_norm / norm.clamp_min(self.max_norm)).to(weights[0].device)
                grads: list[Any] = [weight.grad for weight in weights]
                torch._foreach_mul_(shards_of(grads), shrink)
        # The one wait for the device in a step, hence after both passes. It cannot be left to the device: the
        # base optimizer keeps part of its state on the host.
        finite = math.isfinite(norm + self._first_norm.to(norm.device))
        with self._out_of_sight() if self._remembers else nullcontext():
            if self._scaler:
                self._scaled_step(self._scaler, finite)
            elif finite:
                self.base_optimizer.step()
        if finite:
            self._stepped()
        else:
            self.skipped += 1
        self._opt_called = True  # a scheduler warns if no step came before its own

    def _scaled_step(self, scaler: torch.amp.GradScaler, finite: bool) -> None:
        """Let the scaler step or skip, and adapt its scale: it wants gradients that it has unscaled itself."""
        grads = shards_of([weight.grad for weight in self._weights() if weight.grad is not None])
        if grads:
            torch._foreach_mul_(grads, self._scale(grads[0]))
            if not finite:  # what the first gradient had need not show in the second
                for grad in grads:  # the first one may have no element in this shard
                    grad.fill_(math.nan)
            scaler.step(self.base_optimizer)
            scaler.update()

    def _stepped(self) -> None:
        """The base optimizer has stepped. Variants keep what they need for the next step."""

    @contextmanager
    def _kept_buffers(self) -> Iterator[None]:
        """The buffers of the model, such as batch-norm statistics, are put back behind the pass inside."""
        kept = buffers_of(self.model)
        try:
            yield
        finally:
            put_back(kept)

    @contextmanager
    def _undone_if_skipped(self) -> Iterator[None]:
        """If the step inside is skipped, the buffers of the model are put back to what they were before it."""
        kept, skipped = buffers_of(self.model), self.skipped
        yield
        if self.skipped > skipped:
            put_back(kept)

    def _grads(self) -> dict[Tensor, Tensor]:
        """Copies of the gradients at hand."""
        return {weight: weight.grad.clone() for weight in self._weights() if weight.grad is not None}
