"""The rules: each computes a layer with its weights as constants, and records how they act on the samples."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from samlite.curvature.capture.plan import UncoveredError
from samlite.curvature.capture.recorder import Capture, rule
from samlite.errors import UsageError


def _channels(p: Any, like: Tensor) -> Any:
    """One number a channel, as it broadcasts against tensors (n, channels, ...); None stays None."""
    return None if p is None else p.view(-1, *[1] * (like.dim() - 2))


@rule(F.linear)
def linear(c: Capture, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if not c.owns(weight, bias):
        return NotImplemented
    if c.owns(input):
        raise UncoveredError("linear of a parameter")
    a, eta = c.tapped(input)
    uses = c.uses("linear", weight) + c.uses("shift", bias)
    return c.site(F.linear(a, weight, bias), uses, a if c.owns(weight) else None, eta)


@rule(torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
def matmul(c: Capture, input: Tensor, other: Tensor) -> Any:
    if not c.owns(other) or other.dim() != 2 or input.dim() < 2:
        return NotImplemented
    return linear(c, input, other.t())


@rule(torch.addmm)
def addmm(c: Capture, bias: Tensor, input: Tensor, weight: Tensor) -> Any:
    return linear(c, input, weight.t(), bias)


def _convolution(dimensions: int, function: Callable[..., Tensor]) -> Callable[..., Any]:
    def each(value: Any) -> list[int]:
        return (
            [int(value)] * dimensions
            if isinstance(value, int)
            else [int(v) for v in value] * (dimensions if len(value) == 1 else 1)
        )

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
        if not c.owns(weight, bias):
            return NotImplemented
        if input.dim() != dimensions + 2:
            raise UncoveredError(f"conv{dimensions}d without a sample dimension")
        stride, dilation = each(stride), each(dilation)
        if isinstance(padding, str):
            total = [(d * (k - 1) if padding == "same" else 0) for d, k in zip(dilation, weight.shape[2:], strict=True)]
            if any(t % 2 for t in total):
                input = F.pad(input, [x for t in reversed(total) for x in (0, t % 2)])
            padding = [t // 2 for t in total]
        padding = each(padding)
        a, eta = c.tapped(input)
        z = function(a, weight, bias, stride, padding, dilation, groups)
        uses = c.uses("conv", weight, stride, padding, dilation, groups)
        uses += c.uses("shift", _channels(bias, input))
        return c.site(z, uses, a if c.owns(weight) else None, eta, features=dimensions + 1)

    return convolution


rule(torch.conv1d)(_convolution(1, torch.conv1d))
rule(torch.conv2d)(_convolution(2, torch.conv2d))
rule(torch.conv3d)(_convolution(3, torch.conv3d))


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
    use = c.use("embedding", weight, -1 if padding_idx is None else padding_idx % len(weight))
    if c.plan is None:
        c.lookups.append(all(size % c.samples for size in input.shape))
    else:
        c.lookups.append(c.plan.lookups[len(c.lookups)])
    if c.lookups[-1]:
        c.shared[id(z)] = (z, input, use)
        return z
    return c.site(z, [use], input, features=0)


def _normalisation(
    c: Capture, normal: Tensor, weight: Tensor | None, bias: Tensor | None, channels_first: bool
) -> Tensor:
    """z = weight * normal + bias."""

    features = normal.dim() - 1 if channels_first else (weight if weight is not None else bias).dim()  # type: ignore[union-attr]
    if channels_first:
        weight, bias = _channels(weight, normal), _channels(bias, normal)
    scaled = c.owns(weight)
    a, eta = c.tapped(normal) if scaled else (normal, None)
    z = a if weight is None else a * weight
    z = z if bias is None else z + bias
    return c.site(z, c.uses("scale", weight) + c.uses("shift", bias), a if scaled else None, eta, features=features)


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
    uses = c.uses("scale", weight, mean, inverse) + c.uses("shift", bias)
    # one operation in the graph
    return c.site(torch.addcmul(offset, a, factor), uses, a, eta, features=input.dim() - 1)


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


@rule(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
def add(c: Capture, input: Any, other: Any, *, alpha: Any = 1) -> Any:
    for z, x in ((input, other), (other, input)):
        if id(z) in c.shared and isinstance(x, Tensor):
            return _add_lookup(c, x, z)
    if not c.owns(input, other) or alpha != 1:
        return NotImplemented
    param, x = _parameter_and_other(c, input, other, "add")
    return c.site(x + param, [c.use("shift", param)], features=_features(param))


def _add_lookup(c: Capture, x: Tensor, z: Tensor) -> Tensor:
    _, rows, use = c.shared[id(z)]
    total = x + z
    return c.site(total, [use], rows.expand(total.shape[:-1]), features=0)


@rule(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
def multiply(c: Capture, input: Any, other: Any) -> Any:
    if not c.owns(input, other):
        return NotImplemented
    param, x = _parameter_and_other(c, input, other, "mul")
    a, eta = c.tapped(x)
    z = a * param
    if z.shape != a.shape:
        raise UncoveredError("mul that broadcasts its samples")
    return c.site(z, [c.use("scale", param)], a, eta, features=_features(param))


def _parameter_and_other(c: Capture, input: Any, other: Any, name: str) -> tuple[Tensor, Tensor]:
    """(The parameter, the other operand)."""
    param, x = (input, other) if c.owns(input) else (other, input)
    if c.owns(x) or not isinstance(x, Tensor):
        raise UncoveredError(f"{name} of parameters")
    return param, x


def _features(param: Tensor) -> int:
    """Dimensions that a broadcast parameter fills."""
    return param.dim() - next((d for d, size in enumerate(param.shape) if size > 1), param.dim())


@rule(torch.prelu)
def prelu(c: Capture, input: Tensor, weight: Tensor) -> Any:
    if not c.owns(weight):
        return NotImplemented
    with c:
        return input.clamp_min(0) + input.clamp_max(0) * (weight if weight.numel() == 1 else _channels(weight, input))


@rule(Tensor.expand)
def expand(c: Capture, input: Tensor, *sizes: Any) -> Any:
    """A parameter repeated for every sample, such as a class token, becomes a tensor of its own."""
    sizes = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    if not c.owns(input) or not sizes or sizes[0] != c.samples or (input.dim() == len(sizes) and len(input) != 1):
        return NotImplemented
    z = input.expand(*sizes).clone()
    return c.site(z, [c.use("shift", input)], features=len(sizes) - 1)


@rule(torch.lstm)
def lstm(c: Capture, input: Tensor, *rest: Any) -> Any:
    """Taken apart into its linear layers; padded input only."""
    if isinstance(rest[0], Tensor):  # the sizes of its batches
        raise UncoveredError("lstm of a packed sequence")
    (h0, c0), weights, biased, layers, _, _, bidirectional, batch_first = rest
    x = input.transpose(0, 1) if batch_first else input  # (time, samples, features)
    step = 4 if biased else 2
    if len(weights) != layers * (2 if bidirectional else 1) * step:
        raise UncoveredError("lstm with projections")
    hidden, cells = [], []
    with c:
        for layer in range(layers):
            outputs = []
            for direction in range(2 if bidirectional else 1):
                index = layer * (2 if bidirectional else 1) + direction
                w_x, w_h, *biases = weights[index * step : (index + 1) * step]
                b_x, b_h = biases or (None, None)
                gates_x = F.linear(x, w_x, b_x)
                h, cell, states = h0[index], c0[index], []
                for t in reversed(range(len(x))) if direction else range(len(x)):
                    gates = gates_x[t] + F.linear(h, w_h, b_h)
                    i, f, g, o = gates.chunk(4, -1)
                    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
                    h = o.sigmoid() * cell.tanh()
                    states.append(h)
                outputs.append(torch.stack(states[::-1] if direction else states))
                hidden.append(h)
                cells.append(cell)
            x = torch.cat(outputs, -1)
    return x.transpose(0, 1) if batch_first else x, torch.stack(hidden), torch.stack(cells)


@rule(F.multi_head_attention_forward)
def attention(c: Capture, *args: Any, **kwargs: Any) -> Any:
    """The body of multi_head_attention_forward, so that its linear layers are seen."""
    whole = F.multi_head_attention_forward
    namespace = {**whole.__globals__, "has_torch_function": lambda *_: False}
    body = types.FunctionType(whole.__code__, namespace, whole.__name__, whole.__defaults__)
    body.__kwdefaults__ = whole.__kwdefaults__
    with c:
        return body(*args, **kwargs)
