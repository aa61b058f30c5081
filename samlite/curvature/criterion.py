"""A loss as a function of model and batch: loss modules, and the denominator of their mean."""

import inspect
from collections.abc import Callable
from copy import deepcopy
from itertools import chain
from typing import Any

from torch import Tensor, nn

from samlite.batches import described
from samlite.errors import UsageError

LOSSES: dict[str, type[nn.Module]] = {"cross_entropy": nn.CrossEntropyLoss, "mse": nn.MSELoss}
"""The losses that have a name on the terminal."""
Loss = Callable[[nn.Module, Any], Any] | nn.Module


def as_function(loss_fn: Any, model: nn.Module, like: Tensor) -> Callable[[nn.Module, Any], Any]:
    """A loss as ``loss(model, batch) -> mean loss or (mean loss, weight)``."""
    if isinstance(loss_fn, nn.Module):
        return _Criterion(_beside(loss_fn, model, like))
    if not callable(loss_fn):
        raise UsageError(f"loss_fn must be a loss module or a function of (model, batch), got {described(loss_fn)}")
    if getattr(loss_fn, "__module__", None) == "torch.nn.functional":
        raise UsageError(
            f"loss_fn must be a loss module or a function of (model, batch), got torch.nn.functional."
            f"{loss_fn.__name__}; use its module, as torch.nn.CrossEntropyLoss()"
        )
    try:
        inspect.signature(loss_fn).bind(None, None)
    except TypeError as error:
        raise UsageError(f"loss_fn must take (model, batch): {error}") from None
    except ValueError:  # a builtin without a signature
        pass
    return loss_fn  # type: ignore[no-any-return]


def _beside(criterion: nn.Module, model: nn.Module, like: Tensor) -> nn.Module:
    """A loss module whose own tensors are on the device and of the type of `like`: itself, or a copy of it.

    What it shares with the model, such as the weights that it penalises, is never copied.
    """
    shared: dict[int, Any] = {}
    for module in model.modules():
        shared |= {id(part): part for part in (module, *module._parameters.values(), *module._buffers.values())}

    def fits(tensor: Tensor) -> bool:
        return tensor.device == like.device and (tensor.dtype == like.dtype or not tensor.is_floating_point())

    own = [t for t in chain(criterion.parameters(), criterion.buffers()) if id(t) not in shared]
    if all(map(fits, own)):
        return criterion
    known = set(shared)
    twin = deepcopy(criterion, shared)
    for module in twin.modules():
        if id(module) in known:
            continue
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and id(tensor) not in known:
                tensor.data = tensor.to(like.device, like.dtype if tensor.is_floating_point() else tensor.dtype)
    return twin


class _Criterion:
    """criterion(model(inputs), targets) with the denominator that the criterion divides by as the weight.

    Of an output with logits, as those of transformers, these are taken.
    """

    def __init__(self, criterion: nn.Module) -> None:
        self.criterion = criterion
        self.reduction = getattr(criterion, "reduction", "mean")
        if self.reduction == "none":
            raise UsageError("the reduction of the loss module must be 'mean' or 'sum', got 'none'")

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise UsageError(
                f"a loss module needs batches (inputs, targets), got {described(batch)}; "
                "pass a function of (model, batch) instead"
            )
        inputs, targets = batch
        outputs = model(inputs)
        loss = self.criterion(getattr(outputs, "logits", outputs), targets)
        if self.reduction == "sum":
            return loss / max(len(targets), 1), len(targets)
        return loss, denominator(self.criterion, targets)


def denominator(criterion: nn.Module, targets: Tensor) -> Any:
    """What a loss module divides by: valid targets, their weights, or what its own `denominator(targets)` says."""
    own = getattr(criterion, "denominator", None)
    if own is not None:
        return own(targets)
    if getattr(criterion, "reduction", "mean") == "batchmean":
        return len(targets)
    if isinstance(criterion, nn.CrossEntropyLoss | nn.NLLLoss) and not targets.is_floating_point():
        valid = targets != criterion.ignore_index
        weight = criterion.weight
        if weight is None:
            return valid.sum()
        return (weight.to(targets.device)[targets.where(valid, 0)] * valid).sum()
    return targets.numel()
