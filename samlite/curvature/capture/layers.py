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
    a, eta = c.tapped(input)
    uses = c.uses("Linear", weight) + c.uses("Shift", bias)
    return c.site(F.linear(a, weight, bias), uses, a if c.owns(weight) else None, eta)


@rule(torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__)
def matmul(c: Capture, input: Tensor, other: Tensor) -> Any:
    if c.owns(other) and other.dim() == 2 and input.dim() >= 2:
        return linear(c, input, other.t())
    if c.owns(input) == c.owns(other) or input.dim() < 2 or other.dim() < 2:
        return NotImplemented
    letters = _LETTERS[: max(input.dim(), other.dim()) - 2]
    return contraction(c, _tail(letters, input) + "xy", _tail(letters, other) + "yz", letters + "xz", input, other)


def _tail(letters: str, operand: Tensor) -> str:
    return letters[len(letters) + 2 - operand.dim() :]


@rule(torch.addmm)
def addmm(c: Capture, bias: Tensor, input: Tensor, weight: Tensor) -> Any:
    return linear(c, input, weight.t(), bias)


@rule(torch.einsum, torch.functional.einsum)
def einsum(c: Capture, equation: Any, *operands: Any) -> Any:
    operands = tuple(operands[0]) if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
    if not isinstance(equation, str) or len(operands) != 2 or "." in equation:
        return NotImplemented
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    left, _, right = inputs.partition(",")
    return contraction(c, left, right, output, *operands) if arrow else NotImplemented


def contraction(c: Capture, left: str, right: str, output: str, x: Tensor, y: Tensor) -> Any:
    """A product of a parameter and a tensor with samples that sums over what the output lacks, as in einsum."""
    if c.owns(x) == c.owns(y):
        return NotImplemented
    (labels, a), (of_weight, weight) = sorted(((left, x), (right, y)), key=lambda side: c.owns(side[1]))
    if (dim := c.grows(a)) is None or dim < 0:
        return NotImplemented
    sample = labels[dim]
    shape, lone = dict(zip(of_weight, weight.shape, strict=True)), []
    for i, (label, size) in enumerate(zip(labels, a.shape, strict=True)):
        if shape.get(label, size) != size:
            if size != 1:
                return NotImplemented
            lone.append(i)  # broadcast
    a, labels = a.squeeze(lone), "".join(label for i, label in enumerate(labels) if i not in lone)
    known, rest = [set(labels), set(of_weight), set(output)], ""
    if any(len(part) != len(text) for part, text in zip(known, (labels, of_weight, output), strict=True)):
        return NotImplemented
    if sample in of_weight or sample not in output or any(
        not part <= known[(i + 1) % 3] | known[(i + 2) % 3] for i, part in enumerate(known)
    ):  # fmt: skip
        return NotImplemented
    rest, of_output = labels.replace(sample, ""), output.replace(sample, "")
    a, eta = c.tapped(a.movedim(labels.index(sample), 0))
    names = {label: _LETTERS[i] for i, label in enumerate(sorted(set(rest + of_weight + of_output)))}
    rest, of_weight, of_output = ("".join(names[label] for label in part) for part in (rest, of_weight, of_output))
    z = torch.einsum(f"Z{rest},{of_weight}->Z{of_output}", a, weight)
    z = c.site(z, c.uses("Contraction", weight, rest, of_weight, of_output), a, eta)
    return z.movedim(0, output.index(sample))


_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@in_parts(F.bilinear)
def bilinear(c: Capture, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if not c.owns(weight, bias):
        return NotImplemented
    with c:
        products = (input1.unsqueeze(-1) * input2.unsqueeze(-2)).flatten(-2)
        return F.linear(products, weight.flatten(1), bias)


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
        settings = [_each(dimensions, value) for value in (stride, padding, output_padding, dilation)]
        uses = c.uses("ConvTranspose", weight, *settings, groups) + c.uses("Shift", _channels(bias, input))
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


def _recurrent(step: Callable[..., Any], c: Capture, input: Tensor, h0: Any, rest: Sequence[Any]) -> Any:
    """A recurrent network by its linear layers, of padded input.

    Args:
        step: (W_x x, W_h h, the states of a layer) -> the next states, the first of them being the output.
        h0: of each state (layers, samples, size).
    """
    weights, biased, layers, _, _, bidirectional, batch_first = rest
    directions, parts = (2 if bidirectional else 1), (4 if biased else 2)
    if len(weights) != layers * directions * parts:
        raise UncoveredError("lstm with projections")
    if input.dim() != 3:
        return NotImplemented
    x = input.transpose(0, 1) if batch_first else input  # (time, samples, features)
    last: list[Any] = []
    with c:
        for layer in range(layers):
            outputs = []
            for direction in range(directions):
                index = layer * directions + direction
                w_x, w_h, *biases = weights[index * parts : (index + 1) * parts]
                b_x, b_h = biases or (None, None)
                from_x, states, seen = F.linear(x, w_x, b_x), tuple(h[index] for h in h0), []
                for t in reversed(range(len(x))) if direction else range(len(x)):
                    states = step(from_x[t], F.linear(states[0], w_h, b_h), *states)
                    seen.append(states[0])
                outputs.append(torch.stack(seen[::-1] if direction else seen))
                last.append(states)
            x = torch.cat(outputs, -1)
    return x.transpose(0, 1) if batch_first else x, *map(torch.stack, zip(*last, strict=True))


def _lstm_step(x: Tensor, h: Tensor, _: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = (x + h).chunk(4, -1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def _gru_step(x: Tensor, h: Tensor, state: Tensor) -> tuple[Tensor]:
    (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, -1), h.chunk(3, -1)
    z, new = (x_z + h_z).sigmoid(), (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
    return (new + z * (state - new),)


@in_parts(torch.index_select, Tensor.index_select)
def index_select(c: Capture, input: Tensor, dim: int, index: Tensor) -> Any:
    """Another order of the samples, as packing makes it."""
    if c.owns(input) or not isinstance(dim, int) or index.shape != input.shape[dim : dim + 1]:
        return NotImplemented
    result = input.index_select(dim, index)
    c.rows[id(result)] = result, index
    return result


@in_parts(torch._VF._pack_padded_sequence)
def pack(c: Capture, input: Tensor, lengths: Tensor, batch_first: bool) -> Any:
    data, sizes = torch._VF._pack_padded_sequence(input, lengths, batch_first)
    count = input.shape[0 if batch_first else 1]
    _, order = c.rows.get(id(input), (None, torch.arange(count, device=input.device)))
    if count == c.samples == len(order):
        c.rows[id(data)] = data, torch.cat([order[:size] for size in sizes.tolist()])
    return data, sizes


def _packed(step: Callable[..., Any], c: Capture, data: Tensor, sizes: Tensor, h0: Any, rest: Sequence[Any]) -> Any:
    """A recurrent network on a packed sequence: at time t, sizes[t] samples go on, in the order of their lengths."""
    weights, biased, layers, _, _, bidirectional = rest
    _, owner = c.rows[id(data)]
    directions, parts, counts = (2 if bidirectional else 1), (4 if biased else 2), sizes.tolist()
    starts = [sum(counts[:t]) for t in range(len(counts))]

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None, owner: Tensor) -> Tensor:
        a, eta = c.tapped(x)
        uses = c.uses("Linear", weight) + c.uses("Shift", bias)
        return c.site(F.linear(a, weight, bias), uses, a, eta, owner)

    x, last = data, []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            w_x, w_h, *biases = weights[index * parts : (index + 1) * parts]
            b_x, b_h = biases or (None, None)
            from_x, first = linear(x, w_x, b_x, owner), tuple(h[index] for h in h0)
            seen: list[Any] = [None] * len(counts)
            states, ended = tuple(h[: counts[-1 if direction else 0]] for h in first), []
            for t in reversed(range(len(counts))) if direction else range(len(counts)):
                count, rows = counts[t], slice(starts[t], starts[t] + counts[t])
                if count < len(states[0]):
                    ended.append(tuple(h[count:] for h in states))
                states = tuple(
                    torch.cat([h[:count], begun[len(h) : count]]) for h, begun in zip(states, first, strict=True)
                )
                states = step(from_x[rows], linear(states[0], w_h, b_h, owner[rows]), *states)
                seen[t] = states[0]
            outputs.append(torch.cat(seen))
            last.append(tuple(torch.cat(parts) for parts in zip(states, *reversed(ended), strict=True)))
        x = torch.cat(outputs, -1)
        c.rows[id(x)] = x, owner
    return x, *map(torch.stack, zip(*last, strict=True))


def _recurrent_parts(step: Callable[..., Any], name: str) -> Callable[..., Any]:
    def recurrent(c: Capture, input: Tensor, h0: Any, *rest: Any) -> Any:
        if not isinstance(rest[1], bool):  # (data, the sizes of its batches, h0, weights, ...)
            if id(input) not in c.rows:
                raise UncoveredError(f"{name} of a sequence that was packed outside")
            first = (rest[0],) if isinstance(rest[0], Tensor) else rest[0]
            return _packed(step, c, input, h0, first, rest[1:])
        return _recurrent(step, c, input, (h0,) if isinstance(h0, Tensor) else h0, rest)

    return recurrent


in_parts(torch.lstm)(_recurrent_parts(_lstm_step, "lstm"))
in_parts(torch.gru)(_recurrent_parts(_gru_step, "gru"))
in_parts(torch.rnn_tanh)(_recurrent_parts(lambda x, h, state: ((x + h).tanh(),), "rnn"))
in_parts(torch.rnn_relu)(_recurrent_parts(lambda x, h, state: ((x + h).relu(),), "rnn"))


@in_parts(F.multi_head_attention_forward)
def attention(c: Capture, *args: Any, **kwargs: Any) -> Any:
    """The body of multi_head_attention_forward, so that its linear layers are seen."""
    whole = F.multi_head_attention_forward
    namespace = {**whole.__globals__, "has_torch_function": lambda *_: False}
    body = types.FunctionType(whole.__code__, namespace, whole.__name__, whole.__defaults__)
    body.__kwdefaults__ = whole.__kwdefaults__
    with c:
        return body(*args, **kwargs)
