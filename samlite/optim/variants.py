"""Variants of SAM. Each changes where the gradient is taken, and shares the rest with `SAM`.

FriendlySAM   ascends by the part of the gradient that its running mean does not explain
              Li, Zhou, He, Yan, Chen, "Friendly sharpness-aware minimization", CVPR 2024
AgnosticSAM   ascends on training data while descending on held-out data
              Nguyen, Tran, Le, "Agnostic sharpness-aware minimization", 2024
SAMPa         takes its two gradients at points that do not depend on each other
              Xie, Pethick, Cevher, "SAMPa: Sharpness-aware minimization parallelized", NeurIPS 2024
"""

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from samlite.optim.sam import SAM, Base, Bucket, Closure, forget_old_weights

_NAMES = ("params", "param_names")  # what a group holds beside its options


class FriendlySAM(SAM):
    """SAM along d = g - sigma m, where m is the running mean of the gradients: m <- lmbda m + (1 - lmbda) g.

    The first gradient starts m, and is itself used as it is. With sigma=0 this is SAM. Accepts every argument of `SAM`
    except `m`.
    """

    _kept = (*SAM._kept, "sigma", "lmbda", "_blank")
    _remembers = ("mean_gradient",)
    _means: dict[Tensor, Tensor] = {}  # of a step, to be kept if it is taken
    _blank = False  # whether zeros stand in the state in place of means, for torch.distributed.checkpoint to load into

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: Base,
        rho: float = 0.05,
        *,
        sigma: float = 1.0,
        lmbda: float = 0.9,
        **kwargs: Any,
    ) -> None:
        _check("sigma", sigma, 0 <= sigma < math.inf, ">= 0 and finite")
        _check("lmbda", lmbda, 0 <= lmbda < 1, ">= 0 and < 1")
        _refuse(self, kwargs, "m")
        super().__init__(params, base_optimizer, rho, **kwargs)
        self.sigma, self.lmbda = sigma, lmbda

    def _ascend(self) -> None:
        if self._blank:
            self._begin()
        shifted: list[Bucket] = []
        self._means = {}
        for group, weights, grads in self._gradients():
            directions = []
            for weight, grad in zip(weights, grads, strict=True):
                mean = self.state[weight].get("mean_gradient", None) if weight in self.state else None
                if mean is not None:
                    mean = mean.to(grad.dtype)  # one that was loaded has the dtype of the weight
                directions.append(grad if mean is None else grad - self.sigma * mean)
                self._means[weight] = grad.clone() if mean is None else mean.lerp(grad, 1 - self.lmbda)
            shifted.append((group, weights, directions))
        self._perturb(shifted)

    def _stepped(self) -> None:
        self._remember("mean_gradient", self._means)

    def _descend(self, buckets: list[Bucket]) -> None:
        super()._descend(buckets)
        self._means = {}

    def _make_state(self) -> Tensor:
        loss = super()._make_state()
        self._remember("mean_gradient", self._grads())
        self._blank = True
        return loss

    def _begin(self) -> None:
        """Take zeros out of the state, unless means have been loaded into them."""
        means = self._take("mean_gradient")
        if any(_is_nonzero(mean) for mean in means.values()):
            self._remember("mean_gradient", means)
        self._blank = False


class AgnosticSAM(SAM):
    """SAM that also descends on held-out data: epsilon = rho g / ‖g‖ - rho_val u / ‖u‖.

    g is the training gradient at w, and u the held-out gradient at w + rho_val v / ‖v‖, v being that at w. Four passes
    a step; with rho_val=0 this is SAM, in two. Draw the held-out batches from the training data, never from those that
    models are selected on. Accepts every argument of `SAM` except `adaptive` and `m`.
    """

    _kept = (*SAM._kept, "rho_val")

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: Base,
        rho: float = 0.05,
        *,
        rho_val: float = 0.05,
        **kwargs: Any,
    ) -> None:
        _check("rho_val", rho_val, 0 <= rho_val < math.inf, ">= 0 and finite")
        _refuse(self, kwargs, "adaptive", "m")
        super().__init__(params, base_optimizer, rho, **kwargs)
        self.rho_val = rho_val
        self._held_out: Sequence[Closure] = ()

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Closure | Sequence[Closure] | None = None, val_closure: Closure | Sequence[Closure] | None = None
    ) -> Tensor:
        """As `SAM.step`, with a closure on a held-out batch beside the one on the training batch."""
        if self.rho_val and not self._only_makes_state(closure):
            self._held_out = self._checked(val_closure)
        return self._step(closure)

    def first_step(self, zero_grad: bool = False) -> None:
        """Not supported: AgnosticSAM needs four passes. Call step(closure, val_closure)."""
        raise RuntimeError("AgnosticSAM has no first_step; call step(closure, val_closure)")

    def _plain(self) -> bool:
        return super()._plain() and not self.rho_val

    def _ascend(self) -> None:
        towards = [(group, weights, [grad.clone() for grad in grads]) for group, weights, grads in self._gradients()]
        if not self.rho_val:
            return self._perturb(towards)
        self._run(self._held_out)
        buckets = self._gradients()
        self._save([weights for _, weights, _ in buckets])
        norms = [self._add(buckets, self.rho_val)]
        self._run(self._held_out)
        self._restore()
        away = self._gradients()
        self._save([self._weights()])  # a weight may have only one of the gradients
        norms += [self._add(towards), self._add(away, -self.rho_val)]
        self._first_norm = torch.stack([norm.to(norms[0].device) for norm in norms]).sum()
        return None


class SAMPa(SAM):
    """SAM whose two gradients can be taken side by side: at x + rho g / ‖g‖ and at y, one step of g ahead of x.

    g is the gradient at the last y. The weights x descend by (1 - lmbda) of the first gradient, on this batch, and
    lmbda of the second, on the next one; y is where the base optimizer would go from x by g alone. Two gradients a
    step, three in the first one and in one after a step that had no next batch. Accepts every argument of `SAM` except
    `m`.

    With a `process_group` of two processes, which take the same steps with the same batches, each computes one of the
    gradients, and a step takes the time of one and of an exchange.
    """

    _kept = (*SAM._kept, "lmbda")
    _remembers = ("ahead",)
    process_group: Any = None

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: Base,
        rho: float = 0.05,
        *,
        lmbda: float = 0.2,
        process_group: Any = None,
        **kwargs: Any,
    ) -> None:
        _check("lmbda", lmbda, 0 <= lmbda <= 1, "between 0 and 1")
        _refuse(self, kwargs, "m")
        if process_group is not None and dist.get_world_size(process_group) != 2:
            size = dist.get_world_size(process_group)
            raise ValueError(f"process_group must hold two processes, one a gradient, got {size}")
        super().__init__(params, base_optimizer, rho, **kwargs)
        if process_group is not None and any(hasattr(weight, "device_mesh") for weight in self._weights()):
            raise ValueError("process_group must not go with sharded weights, got a DTensor; leave out process_group")
        self.lmbda, self.process_group = lmbda, process_group

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Closure | Sequence[Closure] | None = None,
        next_closure: Closure | Sequence[Closure] | None = None,
    ) -> Tensor:
        """Step, and return the loss of this batch at the perturbed weights.

        Args:
            closure: on this batch, which was the last step's next one.
            next_closure: on the next batch; None where there is none, and then the first gradient counts in full.
        """
        if self._only_makes_state(closure):
            return self._make_state()
        closures = self._checked(closure)
        following = self._checked(next_closure) if next_closure is not None else ()
        with self._undone_if_skipped():
            if not self._recall():
                with self._kept_buffers():
                    self._run(closures)
            ahead = self._grads()
            parts: list[Callable[[], Any]] = [
                lambda: self._at_perturbed(closures),
                lambda: self._at_y(ahead, following),
            ]
            both = [part() for part in parts] if self.process_group is None else self._exchanged(parts)
            (here, loss), (there, _) = both
            self._next = there
            self._put(_mixed(here, there, self.lmbda) if following else here)
            self._descend(self._gradients())
        result: Tensor = loss
        return result

    def first_step(self, zero_grad: bool = False) -> None:
        """Not supported: SAMPa takes its gradients at other weights. Call step(closure, next_closure)."""
        raise RuntimeError("SAMPa has no first_step; call step(closure, next_closure)")

    def _at_perturbed(self, closures: Sequence[Closure]) -> tuple[dict[Tensor, Tensor], Tensor]:
        """The gradient at x + rho g / ‖g‖, for the g in `.grad`, and the loss there."""
        try:
            self._perturb(self._gradients())
            loss = self._run(closures)
        finally:
            self._restore()
        return self._grads(), loss

    def _at_y(
        self, ahead: dict[Tensor, Tensor], closures: Sequence[Closure]
    ) -> tuple[dict[Tensor, Tensor], Tensor | None]:
        """The gradient at y; weights, buffers and the base optimizer's state stay as they were."""
        if not closures:
            return {}, None
        self._put(ahead)
        self._save([self._weights()])
        try:
            with self._trial():
                self.base_optimizer.step()
            forget_old_weights()
            with self._kept_buffers():
                loss = self._run(closures)
        finally:
            self._restore()
        return self._grads(), loss

    @contextmanager
    def _trial(self) -> Iterator[None]:
        """A step of the base optimizer inside leaves its state and groups as they were: it has copies of them.

        Hooks behind its steps are not told of this one.
        """
        base: Any = self.base_optimizer
        hooks, base._optimizer_step_post_hooks = base._optimizer_step_post_hooks, OrderedDict()
        state, groups = dict(self.state), [dict(group) for group in self.param_groups]
        for weight, values in state.items():
            self.state[weight] = _copied(values)
        for group in self.param_groups:
            group.update(_copied({name: value for name, value in group.items() if name not in _NAMES}))
        try:
            yield
        finally:
            base._optimizer_step_post_hooks = hooks
            self.state.clear()
            self.state.update(state)
            for group, before in zip(self.param_groups, groups, strict=True):
                group.clear()
                group.update(before)

    def _exchanged(self, parts: Sequence[Callable[[], Any]]) -> list[Any]:
        """Both gradients with their losses: the first process computes the one, the second the other."""
        me = dist.get_rank(self.process_group)
        grads, loss = parts[me]()
        own = self._packed(grads, loss, torch.zeros((), device="cpu") if me else self._first_norm)
        messages = [own if me == source else torch.empty_like(own) for source in (0, 1)]
        for source, message in enumerate(messages):
            dist.broadcast(message, group_src=source, group=self.process_group)
        self._first_norm = messages[0][-1]
        for buffer in self.model.buffers() if self.model is not None else ():
            dist.broadcast(buffer, group_src=0, group=self.process_group)  # batch norm saw the batch there
        return [self._unpacked(message) for message in messages]

    def _packed(self, grads: dict[Tensor, Tensor], loss: Tensor | None, norm: Tensor) -> Tensor:
        """One message: every gradient, zeros where there is none; which there are; the loss; and 0 for a finite norm.

        Both processes must skip a step where the first one divided by a norm that is not; then the last number is nan.
        """
        weights = self._weights()
        parts = [grads.get(weight, torch.zeros_like(weight)).flatten() for weight in weights]
        there = parts[0].new_tensor([weight in grads for weight in weights])
        numbers = [parts[0].new_zeros(()) if loss is None else loss, norm * 0]
        return torch.cat([*parts, there, *(number.to(parts[0]).reshape(1) for number in numbers)])

    def _unpacked(self, message: Tensor) -> tuple[dict[Tensor, Tensor], Tensor]:
        weights = self._weights()
        *parts, there, (loss, _) = torch.split(message, [*(weight.numel() for weight in weights), len(weights), 2])
        known = zip(weights, parts, there.tolist(), strict=True)
        return {weight: part.view_as(weight) for weight, part, given in known if given}, loss

    def _put(self, grads: dict[Tensor, Tensor]) -> None:
        for weight in self._weights():
            weight.grad = grads.get(weight)

    def _recall(self) -> bool:
        """Put the gradient at y into `.grad`, if the last step left one."""
        ahead = self._take("ahead")
        grads = {weight: grad for weight, grad in ahead.items() if weight.requires_grad}  # it may be frozen since
        if grads:
            self._put(grads)
        return bool(grads)

    def _stepped(self) -> None:
        self._remember("ahead", self._next)


def _mixed(first: dict[Tensor, Tensor], second: dict[Tensor, Tensor], share: float) -> dict[Tensor, Tensor]:
    """(1 - share) of the first gradients and share of the second; one that is missing counts as zero."""
    mixed = {weight: grad * (1 - share) for weight, grad in first.items()}
    for weight, grad in second.items():
        mixed[weight] = mixed[weight] + share * grad if weight in mixed else share * grad
    return mixed


def _is_nonzero(tensor: Any) -> bool:
    total = tensor.abs().sum()
    return bool(total.full_tensor() if hasattr(total, "full_tensor") else total)


def _copied(values: Any) -> Any:
    """Copies of the values of a dict, of which most are tensors and numbers."""
    if not isinstance(values, dict):
        return copy.deepcopy(values)
    return {name: each.clone() if isinstance(each, Tensor) else copy.deepcopy(each) for name, each in values.items()}


def _check(name: str, value: float, valid: bool, rule: str) -> None:
    if not valid:
        raise ValueError(f"{name} must be {rule}, got {value!r}")


def _refuse(optimizer: SAM, kwargs: dict[str, Any], *names: str) -> None:
    for name in names:
        if kwargs.get(name):
            raise ValueError(f"{name} must not be given to {type(optimizer).__name__}, got {kwargs[name]!r}; use SAM")
