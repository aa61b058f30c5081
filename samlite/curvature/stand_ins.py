"""Functions of torch without the right second derivative, by others that have it."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """torch's own is one operation, whose second derivative is wrong."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    return F.hardtanh(input + 3, 0, 6) / 6


def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str = "") -> Tensor:
    return _length(x1.unsqueeze(-2) - x2.unsqueeze(-3), p)


def _pdist(input: Tensor, p: float = 2.0) -> Tensor:
    first, second = torch.triu_indices(len(input), len(input), 1, device=input.device)
    return _length(input[first] - input[second], p)


def _length(difference: Tensor, p: float) -> Tensor:
    """The p-norm over the last dimension; its derivatives are zero where it is."""
    zero = (difference == 0).all(-1, keepdim=True)
    lengths = torch.linalg.vector_norm(torch.where(zero, 1.0, difference), p, dim=-1)
    return torch.where(zero.squeeze(-1), 0.0, lengths)


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    if mode == "max" or max_norm is not None or not isinstance(weight, Tensor):
        return NotImplemented
    if input.dim() == 2:
        bags, bag = len(input), torch.arange(len(input), device=input.device).repeat_interleave(input.shape[1])
    else:
        assert offsets is not None
        ends = offsets[1:] if include_last_offset else torch.cat([offsets[1:], offsets.new_tensor([len(input)])])
        starts = offsets[: len(ends)]
        bags, bag = len(ends), torch.arange(len(ends), device=input.device).repeat_interleave(ends - starts)
    rows = input.reshape(-1)
    share = (rows != (-1 if padding_idx is None else padding_idx % len(weight))).to(weight.dtype)
    vectors = F.embedding(rows, weight) * share.unsqueeze(-1)
    if per_sample_weights is not None:
        vectors = vectors * per_sample_weights.reshape(-1, 1)
    sums = vectors.new_zeros(bags, weight.shape[1]).index_add(0, bag, vectors)
    if mode == "sum":
        return sums
    return sums / share.new_zeros(bags).index_add(0, bag, share).clamp_min(1).unsqueeze(-1)


def _multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Any:
    if size_average is not None or reduce is not None:
        return NotImplemented
    x, y = (input, target) if input.dim() == 2 else (input.unsqueeze(0), target.unsqueeze(0))
    terms = (margin - x.gather(1, y.unsqueeze(1)) + x).clamp_min(0) ** p
    if weight is not None:
        terms = terms * weight[y].unsqueeze(1)
    others = F.one_hot(y, x.shape[1]) == 0
    losses = (terms * others).sum(1) / x.shape[1]
    return _reduced(losses if input.dim() == 2 else losses[0], reduction)


def _multilabel_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Any:
    if size_average is not None or reduce is not None:
        return NotImplemented
    x, y = (input, target) if input.dim() == 2 else (input.unsqueeze(0), target.unsqueeze(0))
    valid = (y >= 0).long().cumprod(1)  # labels up to the first -1
    named = torch.zeros_like(x).scatter_add(1, y.clamp_min(0), valid.to(x.dtype)) > 0
    margins = (1 - x.gather(1, y.clamp_min(0)).unsqueeze(2) + x.unsqueeze(1)).clamp_min(0)
    losses = (margins * (valid.unsqueeze(2) * ~named.unsqueeze(1))).sum((1, 2)) / x.shape[1]
    return _reduced(losses if input.dim() == 2 else losses[0], reduction)


def _reduced(losses: Tensor, reduction: str) -> Tensor:
    return losses.mean() if reduction == "mean" else losses.sum() if reduction == "sum" else losses


FORMULAS: dict[Any, Callable[..., Any]] = {
    torch._weight_norm: _weight_norm,
    F.hardsigmoid: _hardsigmoid,
    torch._C._nn.hardsigmoid: _hardsigmoid,
    torch.cdist: _cdist,
    torch.functional.cdist: _cdist,
    torch.pdist: _pdist,
    F.pdist: _pdist,
    F.embedding_bag: _embedding_bag,
    F.multi_margin_loss: _multi_margin_loss,
    F.multilabel_margin_loss: _multilabel_margin_loss,
}
"""By a function of torch whose second derivative is wrong or missing: the same function by operations that have one."""


# --- Functions without the right third derivative


def _normalised(input: Tensor, dims: list[int], eps: float) -> Tensor:
    centred = input - input.mean(dims, keepdim=True)
    result: Tensor = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    return result


def _layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    result = _normalised(input, list(range(-len(normalized_shape), 0)), eps)
    result = result if weight is None else result * weight
    return result if bias is None else result + bias


def _by_channel(result: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    shape = (1, -1, *[1] * (result.dim() - 2))
    result = result if weight is None else result * weight.view(shape)
    return result if bias is None else result + bias.view(shape)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if not training:  # fixed statistics, and with them an affine function
        return NotImplemented
    dims = [d for d in range(input.dim()) if d != 1]
    return _by_channel(_normalised(input, dims, eps), weight, bias)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if not use_input_stats:
        return NotImplemented
    return _by_channel(_normalised(input, list(range(2, input.dim())), eps), weight, bias)


DEEPER_FORMULAS: dict[Any, Callable[..., Any]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
}
"""The same for third derivatives, which the Hessian of a loss that differentiates inside takes."""


class TwiceDifferentiable(TorchFunctionMode):
    """Computes functions by formulas that can be differentiated twice, and in float64 throughout.

    Args:
        double: ignore casts to float32, as norms and rotary embeddings make them.
        deeper: whether the loss differentiates inside, so that third derivatives must be right, too.
    """

    def __init__(self, double: bool, deeper: bool = False) -> None:
        super().__init__()
        self._double, self.deeper = double, deeper
        self.differentiates = deeper
        """Whether a derivative was taken so far."""

    def _formula(self, func: Any) -> Callable[..., Any] | None:
        if func in DEEPER_FORMULAS:
            inside = torch._C._functorch.peek_interpreter_stack() is not None  # torch.func.grad and others
            self.differentiates |= inside
            return DEEPER_FORMULAS[func] if self.deeper or inside else None
        return FORMULAS.get(func)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.differentiates |= func is torch.autograd.grad
        formula = self._formula(func)
        if formula is not None and (result := formula(*args, **kwargs)) is not NotImplemented:
            return result
        if self._double:
            func = Tensor.double if func is Tensor.float else func
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in kwargs.items()}
        return func(*args, **kwargs)


class _Direct:
    """Stands in for checkpointing, which recomputes outside of all this: the function is called once."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return function(*args)

    @staticmethod
    def generator(*args: Any, **kwargs: Any) -> Iterator[None]:
        yield


_GENERATOR = "_checkpoint_without_reentrant_generator"
_STAND_INS: tuple[tuple[str, str, Any], ...] = (  # where they are: versions of torch differ
    ("torch.utils.checkpoint", "CheckpointFunction", _Direct),
    ("torch.utils.checkpoint", _GENERATOR, _Direct.generator),
    ("torch.utils.checkpoint", f"{_GENERATOR}_impl", _Direct.generator),
    ("torch.distributed._composable.checkpoint_activation", _GENERATOR, _Direct.generator),
    ("torch.distributed._composable.checkpoint_activation", f"{_GENERATOR}_impl", _Direct.generator),
)
_lock, _depth = threading.Lock(), 0
_replaced: list[tuple[Any, str, Any]] = []


@contextmanager
def without_checkpointing() -> Iterator[None]:
    """Replace the functions of checkpointing where torch itself looks them up."""
    global _depth
    with _lock:
        _depth += 1
        if _depth == 1:
            known = [(sys.modules.get(place), name, other) for place, name, other in _STAND_INS]
            there = [(place, name, other) for place, name, other in known if hasattr(place, name)]
            _replaced[:] = [(place, name, getattr(place, name)) for place, name, _ in there]
            for place, name, other in there:
                setattr(place, name, other)
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                for place, name, original in _replaced:
                    setattr(place, name, original)
