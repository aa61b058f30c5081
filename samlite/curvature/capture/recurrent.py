"""Recurrent networks taken apart into their linear layers, padded or packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from samlite.curvature.capture.layers import linear_site
from samlite.curvature.capture.plan import UncoveredError
from samlite.curvature.capture.recorder import Capture, in_parts

Step = Callable[..., Any]
"""(W_x x, W_h h, the states of a layer) -> the next states, the first of them being the output."""
Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # W_x, W_h, and their biases


def _stacked(run: Callable[..., Any], x: Tensor, h0: Sequence[Tensor], rest: Sequence[Any]) -> tuple[Tensor, ...]:
    """The output of all layers, and their last states.

    Args:
        run: (input, first states, weights, whether backwards) -> (output, last states) of a layer in one direction.
        h0: of each state (layers, samples, size).
    """
    weights, biased, layers, _, _, bidirectional, *_ = rest
    directions, parts = (2 if bidirectional else 1), (4 if biased else 2)
    if len(weights) != layers * directions * parts:
        raise UncoveredError("lstm with projections")
    last: list[Any] = []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            own = (*weights[index * parts : (index + 1) * parts], None, None)[:4]
            output, states = run(x, tuple(h[index] for h in h0), own, direction == 1)
            outputs.append(output)
            last.append(states)
        x = torch.cat(outputs, -1)
    return x, *map(torch.stack, zip(*last, strict=True))


def _padded(step: Step, c: Capture, input: Tensor, h0: Sequence[Tensor], rest: Sequence[Any]) -> Any:
    """A recurrent network on sequences of one length."""
    if input.dim() != 3:
        return NotImplemented
    batch_first = rest[-1]

    def run(x: Tensor, states: tuple[Tensor, ...], weights: Weights, backwards: bool) -> tuple[Tensor, Any]:
        w_x, w_h, b_x, b_h = weights
        from_x, seen = F.linear(x, w_x, b_x), []
        for t in reversed(range(len(x))) if backwards else range(len(x)):
            states = step(from_x[t], F.linear(states[0], w_h, b_h), *states)
            seen.append(states[0])
        return torch.stack(seen[::-1] if backwards else seen), states

    with c:
        x, *last = _stacked(run, input.transpose(0, 1) if batch_first else input, h0, rest)
    return x.transpose(0, 1) if batch_first else x, *last


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


def _packed(step: Step, c: Capture, data: Tensor, sizes: Tensor, h0: Sequence[Tensor], rest: Sequence[Any]) -> Any:
    """A recurrent network on a packed sequence: at time t, sizes[t] samples go on, in the order of their lengths."""
    _, owner = c.rows[id(data)]
    counts = sizes.tolist()
    starts = [sum(counts[:t]) for t in range(len(counts))]

    def run(x: Tensor, first: tuple[Tensor, ...], weights: Weights, backwards: bool) -> tuple[Tensor, Any]:
        w_x, w_h, b_x, b_h = weights
        from_x, seen, ended = linear_site(c, x, w_x, b_x, owner), [x] * len(counts), []
        states = tuple(h[: counts[-1 if backwards else 0]] for h in first)
        for t in reversed(range(len(counts))) if backwards else range(len(counts)):
            count, rows = counts[t], slice(starts[t], starts[t] + counts[t])
            if count < len(states[0]):
                ended.append(tuple(h[count:] for h in states))
            states = tuple(
                torch.cat([h[:count], begun[len(h) : count]]) for h, begun in zip(states, first, strict=True)
            )
            states = step(from_x[rows], linear_site(c, states[0], w_h, b_h, owner[rows]), *states)
            seen[t] = states[0]
        return torch.cat(seen), tuple(torch.cat(parts) for parts in zip(states, *reversed(ended), strict=True))

    x, *last = _stacked(run, data, h0, rest)
    c.rows[id(x)] = x, owner
    return x, *last


def _recurrent_parts(step: Step, name: str) -> Callable[..., Any]:
    def recurrent(c: Capture, input: Tensor, h0: Any, *rest: Any) -> Any:
        if not isinstance(rest[1], bool):  # (data, the sizes of its batches, h0, weights, ...)
            if id(input) not in c.rows:
                raise UncoveredError(f"{name} of a sequence that was packed outside")
            first = (rest[0],) if isinstance(rest[0], Tensor) else rest[0]
            return _packed(step, c, input, h0, first, rest[1:])
        return _padded(step, c, input, (h0,) if isinstance(h0, Tensor) else h0, rest)

    return recurrent


in_parts(torch.lstm)(_recurrent_parts(_lstm_step, "lstm"))
in_parts(torch.gru)(_recurrent_parts(_gru_step, "gru"))
in_parts(torch.rnn_tanh)(_recurrent_parts(lambda x, h, state: ((x + h).tanh(),), "rnn"))
in_parts(torch.rnn_relu)(_recurrent_parts(lambda x, h, state: ((x + h).relu(),), "rnn"))
