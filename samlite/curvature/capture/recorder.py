"""Records how parameters act on samples during one forward pass, for per-sample Hessian chains.

A torch-function mode catches each layer at the function, so functional code and tied weights are seen like modules.
The weights are constants of the pass; every layer's input gets a tap, and its output's gradient edge is taken at once.
Fused recurrent and attention functions are taken apart, so that their layers are seen. Anything else that touches a
measured parameter raises `UncoveredError` with its name: never a silently wrong number.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from samlite.batches import tensors
from samlite.errors import UsageError

Layout = tuple[int, int, int, int]  # dimension of the samples, and its size as outer * samples * inner


class UncoveredError(Exception):
    """A parameter is used in a way that has no per-sample rule here."""


@dataclass(frozen=True)
class Probe:
    """What a site looked like, to find out where its samples are."""

    value: Tensor  # input or output, as it was
    features: int  # trailing dimensions that are not positions


class Capture(TorchFunctionMode):
    """Catches layers during a forward pass of `samples` samples.

    Args:
        params: the measured parameters; they must not require a gradient during the pass.
        plan: where the samples are, as `find_plan` gives it; None only records `probes`.
        taps: whether the derivatives of inputs will be wanted; Gauss-Newton matrices have none.
    """

    def __init__(self, params: Sequence[Tensor], samples: int, plan: Plan | None = None, taps: bool = True) -> None:
        super().__init__()
        self.taps = taps
        self.samples = samples
        self.plan = plan
        self.sites: list[Any] = []
        self.probes: list[Probe] = []
        self._params = params
        # The parameters in a storage, with their places there: several may be parts of one vector.
        self._where: dict[int, list[tuple[int, int, int]]] = {}
        for i, param in enumerate(params):
            self._where.setdefault(_storage(param), []).append((*_extent(param), i))
        self.lookups: list[bool] = []  # of each embedding: whether its rows are the same for all samples
        self._pending: dict[int, tuple[Tensor, Tensor, Any]] = {}  # such (output, rows, use), by the output's id
        self._c = import_module("samlite._C")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None:
            result = handler(self, *args, **kwargs)
            if result is not NotImplemented:
                return result
        touched = self.owns(*tensors((args, kwargs)))
        pending = next((t for t in tensors((args, kwargs)) if id(t) in self._pending), None)
        result = func(*args, **kwargs)
        if pending is not None:
            self._follow(func, pending, result)
        for tensor in tensors(result):
            if touched and self.owner(tensor) is None:
                raise UncoveredError(_name(func))
        if touched and getattr(func, "__name__", "").endswith("_") and not func.__name__.startswith("__"):
            raise UncoveredError(_name(func))
        return result

    # --- Parameters

    def owner(self, tensor: Any) -> int | None:
        """Which parameter a tensor is, or is a view of."""
        if not isinstance(tensor, Tensor):
            return None
        there = self._where.get(_storage(tensor))
        if there is None:
            return None
        first, end = _extent(tensor)
        return next((index for start, stop, index in there if start <= first and end <= stop), None)

    def owns(self, *values: Any) -> bool:
        """Whether one of them is a measured parameter, or a view of one."""
        return any(self.owner(value) is not None for value in values)

    def uses(self, kind: str, view: Tensor | None) -> list[Any]:
        """The use of a parameter, where it is one."""
        return [self.use(kind, view)] if view is not None and self.owns(view) else []

    def use(self, kind: str, view: Tensor) -> Any:
        """The use of a parameter through a view of it."""
        index = self.owner(view)
        assert index is not None
        param = self._params[index]
        sizes, strides = list(view.shape), list(view.stride())
        offset = view.storage_offset() - param.storage_offset()
        if not param.is_contiguous():
            if (view.shape, view.stride(), offset) != (param.shape, param.stride(), 0):
                raise UncoveredError(f"{kind} with a view of a parameter that is not contiguous")
            strides = list(torch.empty(param.shape, device="meta").stride())
        for i, (size, stride) in enumerate(zip(sizes, strides, strict=True)):
            if size > 1 and stride == 0:  # expanded
                if kind not in ("scale", "shift"):
                    raise UncoveredError(f"{kind} with an expanded parameter")
                sizes[i] = 1
        if kind in ("scale", "shift"):  # leading ones only broadcast
            filled = next((i for i, size in enumerate(sizes) if size > 1), len(sizes))
            sizes, strides = sizes[filled:], strides[filled:]
        return self._c.Use(getattr(self._c.Kind, kind), index, sizes, strides, offset)

    # --- Sites

    def tapped(self, a: Tensor) -> tuple[Tensor, Tensor | None]:
        """The input with its tap; without one where it is a constant."""
        if self.plan is None or not self.taps or not a.requires_grad:
            return a, None
        tapped, eta = self._c.tap(a)
        return tapped, eta

    def site(
        self, z: Tensor, uses: list[Any], a: Tensor | None = None, eta: Tensor | None = None, features: int = 1
    ) -> Tensor:
        """Records z = uses . a; `features`: how many trailing dimensions are not positions. Returns z."""
        shown = z if a is None else a
        if not z.requires_grad:  # as it does where the weights are no constants
            z = z + z.new_zeros(()).requires_grad_()
        if self.plan is None:
            self.probes.append(Probe(shown.detach().clone(), features))
            return z
        layout = self.plan.layout(len(self.sites), shown, self.samples)
        site = self._c.Site(a, eta, z, layout)
        for use in uses:
            site.add(use)
        self.sites.append(site)
        return z

    def _follow(self, func: Any, source: Tensor, result: Any) -> None:
        """An embedding that is the same for all samples may be reshaped before it is added to them."""
        if not isinstance(result, Tensor):
            return
        _, rows, use = self._pending[id(source)]
        same_rows = result.shape[-1] == source.shape[-1] and result.numel() == source.numel()
        if not same_rows or _storage(result) != _storage(source):
            raise UncoveredError(f"{_name(func)} of an embedding that is the same for all samples")
        self._pending[id(result)] = (result, rows.reshape(result.shape[:-1]), use)


def _storage(tensor: Tensor) -> int:
    """What a tensor has in common with its views; not the address of the memory, which devices need not tell."""
    address: int = tensor.untyped_storage()._cdata
    return address


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The first element of its storage that a tensor has, and the one behind the last."""
    first = int(tensor.storage_offset())
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + (int(reach) + 1 if tensor.numel() else 0)


# --- Layers: each handler computes the layer with its weights as constants and records it.


def _channels(p: Any, like: Tensor) -> Any:
    """One number a channel, as it broadcasts against tensors (n, channels, ...); None stays None."""
    return None if p is None else p.view(-1, *[1] * (like.dim() - 2))


def _linear(c: Capture, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if not c.owns(weight, bias):
        return NotImplemented
    if c.owns(input):
        raise UncoveredError("linear of a parameter")
    a, eta = c.tapped(input)
    uses = c.uses("linear", weight) + c.uses("shift", bias)
    return c.site(F.linear(a, weight, bias), uses, a if c.owns(weight) else None, eta)


def _matmul(c: Capture, input: Tensor, other: Tensor) -> Any:
    if not c.owns(other) or other.dim() != 2 or input.dim() < 2:
        return NotImplemented
    return _linear(c, input, other.t())


def _addmm(c: Capture, bias: Tensor, input: Tensor, weight: Tensor) -> Any:
    return _linear(c, input, weight.t(), bias)


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
        uses = c.uses("conv", weight)
        for use in uses:
            use.stride, use.padding, use.dilation, use.groups = stride, padding, dilation, groups
        uses += c.uses("shift", _channels(bias, input))
        return c.site(z, uses, a if c.owns(weight) else None, eta, features=dimensions + 1)

    return convolution


def _embedding(
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
    use = c.use("embedding", weight)
    use.padding_row = -1 if padding_idx is None else padding_idx % len(weight)
    if c.plan is None:
        c.lookups.append(all(size % c.samples for size in input.shape))
    else:
        c.lookups.append(c.plan.lookups[len(c.lookups)])
    if c.lookups[-1]:
        c._pending[id(z)] = (z, input, use)
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


def _batch_norm(
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
    uses = c.uses("scale", weight)
    for use in uses:
        use.mean, use.inverse = mean, inverse
    uses += c.uses("shift", bias)
    # one operation in the graph
    return c.site(torch.addcmul(offset, a, factor), uses, a, eta, features=input.dim() - 1)


def _layer_norm(
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


def _rms_norm(
    c: Capture, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Any:
    if not c.owns(weight):
        return NotImplemented
    return _normalisation(c, F.rms_norm(input, normalized_shape, None, eps), weight, None, False)


def _group_norm(
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


def _add(c: Capture, input: Any, other: Any, *, alpha: Any = 1) -> Any:
    for z, x in ((input, other), (other, input)):
        if id(z) in c._pending and isinstance(x, Tensor):
            return _add_lookup(c, x, z)
    if not c.owns(input, other) or alpha != 1:
        return NotImplemented
    param, x = _told_apart(c, input, other, "add")
    return c.site(x + param, [c.use("shift", param)], features=_features(param))


def _add_lookup(c: Capture, x: Tensor, z: Tensor) -> Tensor:
    _, rows, use = c._pending[id(z)]
    total = x + z
    return c.site(total, [use], rows.expand(total.shape[:-1]), features=0)


def _multiply(c: Capture, input: Any, other: Any) -> Any:
    if not c.owns(input, other):
        return NotImplemented
    param, x = _told_apart(c, input, other, "mul")
    a, eta = c.tapped(x)
    z = a * param
    if z.shape != a.shape:
        raise UncoveredError("mul that broadcasts its samples")
    return c.site(z, [c.use("scale", param)], a, eta, features=_features(param))


def _told_apart(c: Capture, input: Any, other: Any, name: str) -> tuple[Tensor, Tensor]:
    """(The parameter, the other operand)."""
    param, x = (input, other) if c.owns(input) else (other, input)
    if c.owns(x) or not isinstance(x, Tensor):
        raise UncoveredError(f"{name} of parameters")
    return param, x


def _features(param: Tensor) -> int:
    """Dimensions that a broadcast parameter fills."""
    return param.dim() - next((d for d, size in enumerate(param.shape) if size > 1), param.dim())


def _prelu(c: Capture, input: Tensor, weight: Tensor) -> Any:
    if not c.owns(weight):
        return NotImplemented
    with c:
        return input.clamp_min(0) + input.clamp_max(0) * (weight if weight.numel() == 1 else _channels(weight, input))


def _expand(c: Capture, input: Tensor, *sizes: Any) -> Any:
    """A parameter repeated for every sample, such as a class token, becomes a tensor of its own."""
    sizes = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    if not c.owns(input) or not sizes or sizes[0] != c.samples or (input.dim() == len(sizes) and len(input) != 1):
        return NotImplemented
    z = input.expand(*sizes).clone()
    return c.site(z, [c.use("shift", input)], features=len(sizes) - 1)


def _lstm(c: Capture, input: Tensor, *rest: Any) -> Any:
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


def _attention(c: Capture, *args: Any, **kwargs: Any) -> Any:
    """The body of multi_head_attention_forward, so that its linear layers are seen."""
    whole = F.multi_head_attention_forward
    namespace = {**whole.__globals__, "has_torch_function": lambda *_: False}
    body = types.FunctionType(whole.__code__, namespace, whole.__name__, whole.__defaults__)
    body.__kwdefaults__ = whole.__kwdefaults__
    with c:
        return body(*args, **kwargs)


_HANDLERS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.mm: _matmul,
    Tensor.__matmul__: _matmul,
    torch.addmm: _addmm,
    torch.conv1d: _convolution(1, torch.conv1d),
    torch.conv2d: _convolution(2, torch.conv2d),
    torch.conv3d: _convolution(3, torch.conv3d),
    F.embedding: _embedding,
    F.batch_norm: _batch_norm,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    torch.add: _add,
    Tensor.add: _add,
    Tensor.__add__: _add,
    Tensor.__radd__: _add,
    torch.mul: _multiply,
    Tensor.mul: _multiply,
    Tensor.__mul__: _multiply,
    Tensor.__rmul__: _multiply,
    torch.prelu: _prelu,
    Tensor.expand: _expand,
    torch.lstm: _lstm,
    F.multi_head_attention_forward: _attention,
}


def _name(func: Any) -> str:
    return str(resolve_name(func) or getattr(func, "__name__", func))


# --- Where the samples are


@dataclass(frozen=True)
class Plan:
    """Where the samples are at each site: in which dimension, "alone" in it, or with positions "inner" or "outer"."""

    places: list[tuple[int, str]]
    lookups: list[bool]

    def layout(self, site: int, value: Tensor, samples: int) -> Layout:
        dim, kind = self.places[site]
        others, rest = divmod(value.shape[dim], samples)
        if rest or (kind == "alone" and others != 1):
            raise UncoveredError(
                f"a layer whose input of shape {tuple(value.shape)} does not show its {samples} samples"
            )
        return (dim, 1, samples, others) if kind == "inner" else (dim, others, samples, 1)

    def suits(self, seen: Capture) -> bool:
        """Whether this is a plan of another pass, by its sites and their shapes."""
        if len(seen.probes) != len(self.places) or seen.lookups != self.lookups:
            return False
        try:
            for i, probe in enumerate(seen.probes):
                self.layout(i, probe.value, seen.samples)
        except UncoveredError:
            return False
        return True


def find_plan(base: Capture, changed: list[Capture]) -> Plan:
    """Where the samples are at each site.

    Args:
        base: a pass over a few samples.
        changed: passes after a change of sample j alone, for each j.

    Raises:
        UncoveredError: they are nowhere, such as behind an operation that mixes samples.
    """
    places = []
    for i, probe in enumerate(base.probes):
        touched = [probe.value != other.probes[i].value for other in changed]
        options = _candidates(probe, len(changed))
        fitting = [option for option in options if _fits(option, touched)]
        if not fitting:
            raise UncoveredError(f"a layer on shape {tuple(probe.value.shape)} whose samples are not apart")
        places.append(fitting[0])
    return Plan(places, base.lookups)


def _candidates(probe: Probe, samples: int) -> list[tuple[int, str]]:
    """Dimensions that can hold the samples, alone or merged with positions behind or before them."""
    positions = probe.value.shape[: probe.value.dim() - probe.features]
    alone = [(d, "alone") for d, size in enumerate(positions) if size == samples]
    merged = [(d, size) for d, size in enumerate(positions) if size != samples and size % samples == 0]
    return alone + [(d, kind) for d, _ in merged for kind in ("inner", "outer")]


def _fits(option: tuple[int, str], touched: list[Tensor]) -> bool:
    """Whether only the entries of sample j changed with it."""
    dim, kind = option
    samples = len(touched)
    for j, mask in enumerate(touched):
        index = torch.arange(mask.shape[dim], device=mask.device)
        owner = index // (len(index) // samples) if kind == "inner" else index % samples
        if bool(mask.movedim(dim, 0)[owner != j].any()):
            return False
    return True
