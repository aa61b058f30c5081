"""Variants of SAM. Each changes where the gradient is taken, and shares the rest with `SAM`.

FriendlySAM   ascends by the part of the gradient that its running mean does not explain
              Li, Zhou, He, Yan, Chen, "Friendly sharpness-aware minimization", CVPR 2024
AgnosticSAM   ascends on training data while descending on held-out data
              Nguyen, Tran, Le, "Agnostic sharpness-aware minimization", 2024
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from samlite.optim.perturbation import Bucket, climb_, gradients_of
from samlite.optim.sam import SAM, Base, Closure


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
        check("sigma", sigma, 0 <= sigma < math.inf, ">= 0 and finite")
        check("lmbda", lmbda, 0 <= lmbda < 1, ">= 0 and < 1")
        refuse(self, kwargs, "m")
        super().__init__(params, base_optimizer, rho, **kwargs)
        self.sigma, self.lmbda = sigma, lmbda

    def _ascend(self) -> None:
        if self._blank:
            self._begin()
        shifted: list[Bucket] = []
        self._means = {}
        for group, weights, grads in gradients_of(self.param_groups):
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
        check("rho_val", rho_val, 0 <= rho_val < math.inf, ">= 0 and finite")
        refuse(self, kwargs, "adaptive", "m")
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
        towards = [
            (group, weights, [grad.clone() for grad in grads])
            for group, weights, grads in gradients_of(self.param_groups)
        ]
        if not self.rho_val:
            return self._perturb(towards)
        self._run(self._held_out)
        buckets = gradients_of(self.param_groups)
        self._snapshot.take([weights for _, weights, _ in buckets])
        norms = [climb_(buckets, self.rho_val)]
        self._run(self._held_out)
        self._restore()
        away = gradients_of(self.param_groups)
        self._snapshot.take([self._weights()])  # a weight may have only one of the gradients
        norms += [climb_(towards), climb_(away, -self.rho_val)]
        self._first_norm = torch.stack([norm.to(norms[0].device) for norm in norms]).sum()
        return None


def check(name: str, value: float, valid: bool, rule: str) -> None:
    if not valid:
        raise ValueError(f"{name} must be {rule}, got {value!r}")


def refuse(optimizer: SAM, kwargs: dict[str, Any], *names: str) -> None:
    for name in names:
        if kwargs.get(name):
            raise ValueError(f"{name} must not be given to {type(optimizer).__name__}, got {kwargs[name]!r}; use SAM")


def _is_nonzero(tensor: Any) -> bool:
    total = tensor.abs().sum()
    return bool(total.full_tensor() if hasattr(total, "full_tensor") else total)
