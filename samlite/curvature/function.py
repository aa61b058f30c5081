"""A data set as a stream of weighted losses, evaluated so that the model is left as it was.

The Hessian is that of one fixed function of the weights: the mean loss over the samples of the data, in eval mode
unless asked otherwise, in full float32 or float64, with no dropout, shuffling or augmentation. This file turns a
model, a loss and data into that function, batch by batch; `samlite._C` differentiates it.
"""

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy, deepcopy
from functools import cached_property
from itertools import chain, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from samlite.batches import described, is_pair, mapped, placed, rows, samples, tensors
from samlite.curvature.capture.plan import UncoveredError
from samlite.curvature.capture.recorder import Capture
from samlite.curvature.compiled import compiled
from samlite.curvature.criterion import Loss, as_function
from samlite.curvature.memory import operations_behind
from samlite.curvature.neutral import neutral
from samlite.curvature.stream import PROBE, Data, End, Stream, reason
from samlite.curvature.untouched import modules_in, untouched
from samlite.errors import UsageError

_DRIFT = 1e-4  # relative change of a loss that is more than rounding in float32


class Losses(Stream):
    """The losses of a data set's batches, each times its number of samples, with a graph down to the parameters.

    Args:
        loss_fn: ``loss_fn(model, batch)`` giving the mean loss or (mean loss, weight), or a loss module.
        data: as of `Stream`.
        parameters: those to differentiate by; everything else is a constant.
    """

    def __init__(self, model: nn.Module, loss_fn: Loss, data: Data, parameters: list[nn.Parameter], mode: str) -> None:
        super().__init__(data)
        self.model, self.parameters, self.mode = model, parameters, mode
        self._loss_fn, self.loss = loss_fn, as_function(loss_fn, model, like=parameters[0])
        self.held = modules_in(self.loss)
        self._writes = False  # the loss writes into its batch
        self._deeper = False  # the loss takes derivatives itself
        self._first: tuple[float, list[Any]] | None = None  # the loss of the first batch, and the weights' state

    @property
    def divisible(self) -> bool:
        """Whether the rows of a pair may be cut as memory asks."""
        return is_pair(self.data) and not self.coupled

    def again(self) -> "Losses":
        """The same losses with a cut and a stream of their own."""
        twin = copy(self)
        twin.whole()
        return twin

    def doubled(self) -> "Losses":
        """The same losses of a copy of the model in float64."""
        return self.copied(torch.float64)

    def copied(self, dtype: torch.dtype) -> "Losses":
        """The same losses of a copy of the model in another type."""
        twins: dict[int, Any] = {}
        model = deepcopy(self.model, twins).to(dtype)
        loss_fn = deepcopy(self._loss_fn, twins) if isinstance(self._loss_fn, nn.Module) else self._loss_fn
        if not all(id(p) in twins for p in self.parameters):
            raise TypeError("the model must be copied with its parameters, got one that makes others (scripted)")
        # `to` replaces the values of parameters, not the parameters
        copied = Losses(model, loss_fn, self.data, [twins[id(p)] for p in self.parameters], self.mode)
        copied._deeper = self._deeper
        return copied

    def neutral(self) -> AbstractContextManager[None]:
        """The conditions in which losses are evaluated and differentiated."""
        return neutral(self.parameters)

    def state(self) -> list[tuple[Any, ...]]:
        """Changes when weights or buffers do: version and place, and a norm for changes through `.data`."""
        everything = {id(t): t for m in (self.model, *self.held) for t in chain(m.parameters(), m.buffers())}
        tracked = [t for t in everything.values() if not t.is_inference()]
        norms = torch._foreach_norm([t.detach() for t in tracked if t.is_floating_point()])
        values = torch.stack([n.double().to(norms[0].device) for n in norms]).tolist() if norms else []
        return [*((t._version, t.data_ptr()) for t in tracked), *((v,) for v in values)]

    def total(self, batch: Any, capture: Capture | None = None) -> tuple[Tensor, float]:
        """(Sum of the batch's losses, its number or weight of samples), as a `capture` sees it.

        Raises:
            UsageError: the loss cannot be computed on the batch, or the first one is not what it was.
        """
        before = compiled().sequence_number()
        with torch.enable_grad():
            value, weight = self._evaluate(batch, [] if capture and capture.fixed else self.parameters, capture=capture)
            index = max(self.index, 0)
            if index == len(self.weights):  # reading it waits for the device: in the first pass only
                self.weights.append(_checked_weight(weight, index))
                if self.index == 0:
                    self._check_first(value)
            known = self.weights[index]
            # The mean over an empty batch is NaN; with weight 0 it must not contribute.
            total = value * known if known > 0 else value.nan_to_num() * 0
        self.index += 1
        compiled().drop_hooks([total], before)
        return total, known

    def gradient(self) -> tuple[Tensor, float]:
        """(The gradient of the sum of all losses: (p,), their weight)."""
        device, dtype = self.parameters[0].device, self.parameters[0].dtype
        sums = torch.zeros(sum(p.numel() for p in self.parameters), dtype=dtype, device=device)
        weights = 0.0
        self.rewind(0)
        while (batch := self.next_batch()) is not End:
            total, weight = self.total(batch)
            weights += weight
            if total.requires_grad:
                sums += flat_gradient(total, self.parameters)
        return sums, weights

    def _check_first(self, value: Tensor) -> None:
        if self._first is None or is_pair(self.data) or self.single:
            return
        before, weights = self._first
        now = float(value.detach())
        if abs(now - before) > _DRIFT * max(abs(now), abs(before)) and weights == self.state():
            raise UsageError(
                f"data must give the same batches and losses at every pass, got {before:.6g}, then {now:.6g} on "
                "the first batch; switch off shuffling, sampling and augmentation"
            )

    def _evaluate(
        self,
        batch: Any,
        parameters: Iterable[Tensor],
        seed: int = 0,
        capture: AbstractContextManager[Any] | None = None,
    ) -> tuple[Tensor, Any]:
        where = f"batch {self.index}" if self.index > 0 else "the first batch"
        try:
            batch = placed(batch, self.parameters[0])
            if self._writes:
                batch = _cloned(batch)
            around = untouched(self.model, self.held, parameters, self.mode, seed, self._deeper)
            with around as functions, capture or nullcontext():
                result = self.loss(self.model, batch)
            self._deeper |= functions.differentiates
        except (UsageError, UncoveredError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of the model, the loss or the data, whatever they are
            if capture:
                raise UncoveredError(f"this model, whose weights cannot be constants ({reason(error)})") from error
            raise UsageError(f"the loss must be computable on {where}, got {reason(error)}") from error
        value, weight = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
            raise UsageError(
                f"loss_fn must return the mean loss over the batch as a scalar tensor, got {described(value)} "
                f"on {where}"
            )
        return value.reshape(()), samples(batch) if weight is None else weight

    # --- Checks before anything is measured

    def probe(self, size: int) -> None:
        """Evaluate the first batch twice (of a pair of tensors: its first rows), so that bad input shows at once.

        Raises:
            UsageError: the loss is not a finite scalar with a gradient, or not the same function in the second pass, or
                it writes into the weights.
        """
        self.rewind(0)
        batch: Any = (self.data[0][:size], self.data[1][:size]) if is_pair(self.data) else self.next_batch()
        if batch is End:
            raise UsageError("data must hold at least one batch, got none")
        self._check_projections(_cloned(batch))
        with torch.enable_grad(), warnings.catch_warnings(), _restored(self.parameters) as changed:
            # torch only warns where a loss broadcasts targets against outputs of another shape
            warnings.filterwarnings("error", "Using a target size")
            own = _cloned(batch)
            with _calls(self.model) as called:
                value, weight = self._evaluate(own, self.model.parameters())
            self._writes = any(tensor._version > 0 for tensor in tensors(own))
            second = float(self._evaluate(batch, self.parameters, seed=1)[0].detach())
        if changed:
            raise UsageError("the forward pass must leave the parameters as they are, got one that writes into them")
        if _checked_weight(weight, 0) == 0:
            return
        self._check_function(value, second, bool(called))
        self._first = float(value.detach()), self.state()
        self.forget()

    def _check_function(self, value: Tensor, second: float, called: bool) -> None:
        """Raise UsageError unless a loss is finite, the same again, and a function that autograd can differentiate."""
        first = float(value.detach())
        if not math.isfinite(first):
            raise UsageError(f"the loss must be finite, got {first} on the first batch; check weights and data")
        if abs(first - second) > _DRIFT * max(abs(first), abs(second)):
            raise UsageError(
                f"loss_fn must be the same function at every call, got {first:.6g}, then {second:.6g} on the first "
                "batch; switch off dropout, sampling and augmentation (mode='eval' is the default)"
            )
        operations = operations_behind(value)
        if any(name.endswith("NotImplemented") for name in operations):  # what stands in for a derivative
            raise UsageError(
                "the loss must be differentiable, got an operation without a derivative, as quantised layers are; "
                "measure the network in floating point"
            )
        if called and "torch::autograd::AccumulateGrad" not in operations:
            raise UsageError(
                "the loss must depend on the parameters by operations that autograd follows, got one without a graph; "
                "leave no_grad, inference_mode, detach() and item() out of model and loss"
            )

    @cached_property
    def coupled(self) -> bool:
        """Whether the samples of a pair depend on each other, so that it must stay one batch."""
        if not is_pair(self.data):
            return False
        first = tuple(part[:PROBE] for part in self.data)
        n = len(first[0])
        edges = sorted({0, n // 7, n // 2, n})  # unequal parts, as equal ones may agree by chance
        return n > 1 and self.couples(first, [slice(*edge) for edge in pairwise(edges)])

    def couples(self, batch: Any, parts: Sequence[slice]) -> bool:
        """Whether samples depend on each other: the loss of a batch or its gradient is not the mean of its parts'."""
        try:
            if not self._differ(batch, parts, _DRIFT if self.parameters[0].dtype == torch.float32 else 1e-9):
                return False
        except UsageError:  # it takes no other number of samples
            return True
        except RuntimeError:  # it has no derivative, which a product will explain
            return False
        # Losses of fitted samples are rounding, and so are their differences: elsewhere they are not.
        try:
            return self._moved()._differ(batch, parts, 1e-7)
        except (UsageError, RuntimeError, TypeError):  # a model that cannot be copied, float32 in the loss, mps
            return self._differ(batch, parts, 1e-2)

    def _moved(self) -> "Losses":
        """The same losses in float64, of weights some way from these."""
        twin = self.doubled()
        generator = torch.Generator(device="cpu").manual_seed(0)
        with torch.no_grad():
            for p in twin.parameters:
                noise = torch.randn(p.shape, generator=generator, dtype=p.dtype, device="cpu").to(p.device)
                p.add_(0.1 * noise * (p.abs() + p.abs().mean() + 0.1))
        return twin

    def _differ(self, batch: Any, parts: Sequence[slice], tol: float) -> bool:
        (value, gradient), (mean, mean_gradient) = (
            self._mean(batches) for batches in ([batch], [rows(batch, part) for part in parts])
        )
        same = (value - mean).abs() <= tol * torch.maximum(value.abs(), mean.abs())  # not so where a part is nan
        change = [a - b for a, b in zip(gradient, mean_gradient, strict=True)]
        alike = _largest(change) <= 10 * tol * torch.maximum(_largest(gradient), _largest(mean_gradient))
        return not bool(same & alike)

    def _mean(self, batches: Sequence[Any]) -> tuple[Tensor, Sequence[Tensor]]:
        """The mean loss of some batches beside the stream, and its gradient."""
        losses, weights = [], 0.0
        for batch in batches:
            self.forget()
            total, weight = self.total(batch)
            losses.append(total)
            weights += weight
        mean = torch.stack(losses).sum() / (weights or 1)
        if not mean.requires_grad:
            return mean, [torch.zeros_like(mean)]
        return mean.detach(), torch.autograd.grad(mean, self.parameters, allow_unused=True, materialize_grads=True)

    def _check_projections(self, batch: Any) -> None:
        """Refuse an embedding whose rows are too long where other layers use its weight: they would see it change."""
        for name, module in self.model.named_modules():
            if not isinstance(module, nn.Embedding) or module.max_norm is None:
                continue
            longest = float(module.weight.detach().norm(module.norm_type, dim=1).max())
            if longest <= module.max_norm * (1 + 1e-6):
                continue
            uses = _OtherUses(module.weight)
            with torch.no_grad():
                self._evaluate(batch, [], capture=uses)
            if uses.name:
                raise UsageError(
                    f"rows of {name or 'the model'}.weight must not be longer than max_norm={module.max_norm} where "
                    f"{uses.name} uses it as well, got {longest:.4g}; shorten them first (torch.renorm)"
                )


def flat_gradient(value: Tensor, parameters: Sequence[Tensor], create_graph: bool = False) -> Tensor:
    """The gradient of a scalar by parameters, on the device of the first: (p,)."""
    parts = torch.autograd.grad(value, parameters, create_graph=create_graph, allow_unused=True, materialize_grads=True)
    return torch.cat([part.reshape(-1).to(parameters[0].device) for part in parts])


@contextmanager
def _restored(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Put parameters back as they were; the list then holds those that were not."""
    before = [p.detach().clone() for p in parameters]
    changed: list[Tensor] = []
    try:
        yield changed
    finally:
        with torch.no_grad():
            for p, values in zip(parameters, before, strict=True):
                if not _equal(p, values):
                    changed.append(p.copy_(values))


@contextmanager
def _calls(model: nn.Module) -> Iterator[list[nn.Module]]:
    """The modules of the model that are called inside."""
    called: list[nn.Module] = []
    hooked = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]  # which take no hooks
    handles = [m.register_forward_hook(lambda module, *_: called.append(module)) for m in hooked]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


class _OtherUses(TorchFunctionMode):
    """Notes what else than a lookup of rows a tensor is used for."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor, self.name = tensor, ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        used = any(value is self.tensor for value in (*args, *(kwargs or {}).values()))
        if used and func is not F.embedding and isinstance(result, Tensor):
            self.name = getattr(func, "__name__", str(func))
        return result


def _cloned(batch: Any) -> Any:
    return mapped(lambda part: part.clone() if isinstance(part, Tensor) else part, batch)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits; NaN equals itself."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _largest(tensors: Sequence[Tensor]) -> Tensor:
    """The largest magnitude in some tensors; a sum of squares could underflow."""
    largest = [tensor.detach().abs().max() for tensor in tensors if tensor.numel()]
    return torch.stack([value.to(largest[0].device) for value in largest]).max()


def _checked_weight(weight: Any, batch: int) -> float:
    try:
        value = float(weight)
    except (TypeError, ValueError, RuntimeError):
        value = math.nan
    if not 0 <= value < math.inf:
        raise UsageError(
            f"the weight of a batch must be a finite number >= 0, got {described(weight)} on batch {batch}"
        )
    return value
