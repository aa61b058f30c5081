"""Recurrent networks taken apart into their linear layers, padded or packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from samlite.curvature.capture.plan import UncoveredError
from samlite.curvature.capture.recorder import Capture, in_parts


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
