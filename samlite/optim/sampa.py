"""SAM whose two gradients do not depend on each other.

Xie, Pethick, Cevher, "SAMPa: Sharpness-aware minimization parallelized", NeurIPS 2024.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from samlite.optim.perturbation import forget_old_weights, gradients_of
from samlite.optim.sam import SAM, Base, Closure
from samlite.optim.variants import check, refuse

_NAMES = ("params", "param_names")  # what a group holds beside its options


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
        check("lmbda", lmbda, 0 <= lmbda <= 1, "between 0 and 1")
        refuse(self, kwargs, "m")
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
            self._descend(gradients_of(self.param_groups))
        result: Tensor = loss
        return result

    def first_step(self, zero_grad: bool = False) -> None:
        """Not supported: SAMPa takes its gradients at other weights. Call step(closure, next_closure)."""
        raise RuntimeError("SAMPa has no first_step; call step(closure, next_closure)")

    def _at_perturbed(self, closures: Sequence[Closure]) -> tuple[dict[Tensor, Tensor], Tensor]:
        """The gradient at x + rho g / ‖g‖, for the g in `.grad`, and the loss there."""
        try:
            self._perturb(gradients_of(self.param_groups))
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
        self._snapshot.take([self._weights()])
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


def _copied(values: Any) -> Any:
    """Copies of the values of a dict, of which most are tensors and numbers."""
    if not isinstance(values, dict):
        return copy.deepcopy(values)
    return {name: each.clone() if isinstance(each, Tensor) else copy.deepcopy(each) for name, each in values.items()}
