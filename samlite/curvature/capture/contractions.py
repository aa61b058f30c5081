"""Products that are linear in a parameter and in the samples: of matrices, in batches or not, einsum, bilinear."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from samlite.curvature.capture.layers import linear
from samlite.curvature.capture.recorder import Capture, in_parts, rule

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


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
    sample, sizes = labels[dim], dict(zip(of_weight, weight.shape, strict=True))
    lone = [i for i, label in enumerate(labels) if a.shape[i] == 1 != sizes.get(label, 1)]  # broadcast
    labels, a = "".join(label for i, label in enumerate(labels) if i not in lone), a.squeeze(lone)
    if any(sizes.get(label, size) != size for label, size in zip(labels, a.shape, strict=True)):
        return NotImplemented
    if sample in of_weight or sample not in output or not _each_in_two(labels, of_weight, output.replace(sample, "")):
        return NotImplemented
    a, eta = c.tapped(a.movedim(labels.index(sample), 0))
    rest, of_output = labels.replace(sample, ""), output.replace(sample, "")
    names = dict(zip(sorted({*rest, *of_weight, *of_output}), _LETTERS, strict=False))
    rest, of_weight, of_output = ("".join(names[label] for label in part) for part in (rest, of_weight, of_output))
    z = torch.einsum(f"Z{rest},{of_weight}->Z{of_output}", a, weight)
    z = c.site(z, c.uses("Contraction", weight, rest, of_weight, of_output), a, eta)
    return z.movedim(0, output.index(sample))


def _each_in_two(labels: str, of_weight: str, of_output: str) -> bool:
    """Whether each label of weight and output is in another one, too, those of the input likewise; and none twice."""
    parts = [set(labels), set(of_weight), set(of_output)]
    apart = all(len(part) == len(text) for part, text in zip(parts, (labels, of_weight, of_output), strict=True))
    alone = [part - parts[i - 1] - parts[i - 2] for i, part in enumerate(parts)]
    return apart and len(alone[0]) == 1 and not alone[1] and not alone[2]  # the sample's own


@in_parts(F.bilinear)
def bilinear(c: Capture, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if not c.owns(weight, bias):
        return NotImplemented
    with c:
        products = (input1.unsqueeze(-1) * input2.unsqueeze(-2)).flatten(-2)
        return F.linear(products, weight.flatten(1), bias)
