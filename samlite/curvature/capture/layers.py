"""The rules: each computes a layer with its weights as constants, and records how they act on the samples."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from samlite.curvature.capture.plan import UncoveredError
from samlite.curvature.capture.recorder import Capture, in_parts, rule
from samlite.curvature.stand_ins import FORMULAS
from samlite.errors import UsageError


def _channels(p: Any, like: Tensor) -> Any:
    """One number a channel, as it broadcasts against tensors (n, channels, ...); None stays None."""
    return None if p is None else p.view(-1, *[1] * (like.dim() - 2))


@rule(F.linear)
def linear(c: Capture, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if not c.owns(weight, bias) or c.grows(input) is None:
        return NotImplemented
    return linear_site(c, input, weight, bias)


def linear_site(
    c: Capture, input: Tensor, weight: Tensor, bias: Tensor | None = None, owner: Tensor | None = None
) -> Tensor:
    """Computes and records a linear layer; `owner` as of `Capture.site`."""
    a, eta = c.tapped(input)
    uses = c.uses("Linear", weight) + c.uses("Shift", bias)
    return c.site(F.linear(a, weight, bias), uses, a if c.owns(weight) else None, eta, owner)


def _each(dimensions: int, value: Any) -> list[int]:
    """A setting of a convolution in each dimension."""
    if isinstance(value, int):
        return [int(value)] * dimensions
    return [int(v) for v in value] * (dimensions if len(value) == 1 else 1)


def _convolution(dimensions: int, function: Callable[..., Tensor]) -> Callable[..., Any]:
    def convolution(
        c: Capture,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        if not c.owns(weight, bias) or c.grows(input) is None:
            return NotImplemented
        if input.dim() != dimensions + 2:
            raise UncoveredError(f"conv{dimensions}d without a sample dimension")
        stride, dilation = _each(dimensions, stride), _each(dimensions, dilation)
        if isinstance(padding, str):
            total = [(d * (k - 1) if padding == "same" else 0) for d, k in zip(dilation, weight.shape[2:], strict=True)]
            if any(t % 2 for t in total):
                input = F.pad(input, [x for t in reversed(total) for x in (0, t % 2)])
            padding = [t // 2 for t in total]
        padding = _each(dimensions, padding)
        a, eta = c.tapped(input)
        z = function(a, weight, bias, stride, padding, dilation, groups)
        uses = c.uses("Conv", weight, stride, padding, dilation, groups)
        uses += c.uses("Shift", _channels(bias, input))
        return c.site(z, uses, a if c.owns(weight) else None, eta)

    return convolution


rule(torch.conv1d)(_convolution(1, torch.conv1d))
rule(torch.conv2d)(_convolution(2, torch.conv2d))
rule(torch.conv3d)(_convolution(3, torch.conv3d))


def _transposed_convolution(dimensions: int, function: Callable[..., Tensor]) -> Callable[..., Any]:
    def convolution(
        c: Capture,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Any:
        if not c.owns(weight, bias) or c.grows(input) is None or input.dim() != dimensions + 2:
            return NotImplemented
        a, eta = c.tapped(input)
        z = function(a, weight, bias, stride, padding, output_padding, groups, dilation)
        stride, padding, dilation, ends = (_each(dimensions, v) for v in (stride, padding, dilation, output_padding))
        uses = c.uses("Conv", weight, stride, padding, dilation, groups, ends)
        uses += c.uses("Shift", _channels(bias, input))
        return c.site(z, uses, a if c.owns(weight) else None, eta)

    return convolution


rule(torch.conv_transpose1d)(_transposed_convolution(1, torch.conv_transpose1d))
rule(torch.conv_transpose2d)(_transposed_convolution(2, torch.conv_transpose2d))
rule(torch.conv_transpose3d)(_transposed_convolution(3, torch.conv_transpose3d))


@rule(F.embedding)
def embedding(
    c: Capture,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if not c.owns(weight):
        return NotImplemented
    if max_norm is not None or scale_grad_by_freq:
        raise UncoveredError("embedding with max_norm or scale_grad_by_freq")
    z = F.embedding(input, weight)
    use = c.use("Embedding", weight, -1 if padding_idx is None else padding_idx % len(weight))
    return c.own(z, use, input) if c.grows(input) is None else c.site(z, [use], input)


def _normalisation(
    c: Capture, normal: Tensor, weight: Tensor | None, bias: Tensor | None, channels_first: bool
) -> Tensor:
    """z = weight * normal + bias."""
    if channels_first:
        weight, bias = _channels(weight, normal), _channels(bias, normal)
    scaled = c.owns(weight)
    a, eta = c.tapped(normal) if scaled else (normal, None)
    z = a if weight is None else a * weight
    z = z if bias is None else z + bias
    return c.site(z, c.uses("Scale", weight) + c.uses("Shift", bias), a if scaled else None, eta)


@rule(F.batch_norm)
def batch_norm(
    c: Capture,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if training or running_mean is None or running_var is None:
        raise UsageError(
            "moments need samples that do not depend on each other, got batch norm with the statistics of the batch; "
            "use mode='eval', or unit='batch'"
        )

    mean, variance = _channels(running_mean, input), _channels(running_var, input)
    weight, bias = _channels(weight, input), _channels(bias, input)
    inverse = (variance + eps).rsqrt()
    factor = inverse if weight is None else inverse * weight
    offset = -mean * factor if bias is None else bias - mean * factor
    if not c.owns(weight, bias):
        return torch.addcmul(offset, input, factor)
    a, eta = c.tapped(input)
    uses = c.uses("Scale", weight, mean, inverse) + c.uses("Shift", bias)
    # one operation in the graph
    return c.site(torch.addcmul(offset, a, factor), uses, a, eta)


@rule(F.layer_norm)
def layer_norm(
    c: Capture,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    if not c.owns(weight, bias):
        return NotImplemented
    return _normalisation(c, F.layer_norm(input, normalized_shape, None, None, eps), weight, bias, False)


@rule(F.rms_norm)
def rms_norm(
    c: Capture, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Any:
    if not c.owns(weight):
        return NotImplemented
    return _normalisation(c, F.rms_norm(input, normalized_shape, None, eps), weight, None, False)


@rule(F.group_norm)
def group_norm(
    c: Capture,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    if not c.owns(weight, bias):
        return NotImplemented
    return _normalisation(c, F.group_norm(input, num_groups, None, None, eps), weight, bias, True)


@rule(F.instance_norm)
def instance_norm(
    c: Capture,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if not c.owns(weight, bias):
        return NotImplemented
    normal = F.instance_norm(input, running_mean, running_var, None, None, use_input_stats, momentum, eps)
    return _normalisation(c, normal, weight, bias, True)


@rule(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)
def add(c: Capture, input: Any, other: Any, *, alpha: Any = 1) -> Any:
    param, x = _parameter_and_samples(c, input, other)
    if param is None or alpha != 1 or (z := x + param).shape != x.shape:
        return NotImplemented
    return c.site(z, [c.use("Shift", param)])


@rule(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__)
def multiply(c: Capture, input: Any, other: Any) -> Any:
    param, x = _parameter_and_samples(c, input, other)
    if param is None or (x.detach() * param).shape != x.shape:
        return NotImplemented
    a, eta = c.tapped(x)
    return c.site(a * param, [c.use("Scale", param)], a, eta)


def _parameter_and_samples(c: Capture, input: Any, other: Any) -> tuple[Tensor | None, Any]:
    """(The parameter, the operand with samples); None where there are not one of each."""
    param, x = (input, other) if c.owns(input) else (other, input)
    apart = c.owns(param) and not c.owns(x) and isinstance(x, Tensor) and c.grows(x) is not None
    return (param, x) if apart and c.grows(param) is None else (None, x)


@in_parts(torch.prelu)
def prelu(c: Capture, input: Tensor, weight: Tensor) -> Any:
    if not c.owns(weight):
        return NotImplemented
    with c:
        return input.clamp_min(0) + input.clamp_max(0) * (weight if weight.numel() == 1 else _channels(weight, input))


@in_parts(F.embedding_bag)
def embedding_bag(c: Capture, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
    if not c.owns(weight):
        return NotImplemented
    with c:
        return FORMULAS[F.embedding_bag](input, weight, *args, **kwargs)


@in_parts(F.multi_head_attention_forward)
def attention(c: Capture, *args: Any, **kwargs: Any) -> Any:
    """The body of multi_head_attention_forward, so that its linear layers are seen."""
    whole = F.multi_head_attention_forward
    namespace = {**whole.__globals__, "has_torch_function": lambda *_: False}
    body = types.FunctionType(whole.__code__, namespace, whole.__name__, whole.__defaults__)
    body.__kwdefaults__ = whole.__kwdefaults__
    with c:
        return body(*args, **kwargs)
