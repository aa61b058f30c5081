"""Records how parameters act on samples during one forward pass, for per-sample Hessian chains.

A torch-function mode catches each layer at the function, so functional code and tied weights are seen like modules.
The weights are constants of the pass; every layer's input gets a tap, and its output's gradient edge is taken at once.
Fused recurrent and attention functions are taken apart, so that their layers are seen.

What has no rule is lifted: every sample gets its own copy of the parameter, and what is computed from it is computed
for each sample, by `torch.vmap`. That takes as many numbers as the parameter has, times samples. Anything that cannot
be lifted raises `UncoveredError` with its name: never a silently wrong number.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_flatten, tree_unflatten

from samlite.curvature.capture.plan import AMBIGUOUS, Call, Layout, Plan, Probe, Scaled, Seen, UncoveredError
from samlite.curvature.compiled import compiled

_IN_PLACE = re.compile(r"(?!__).*_|__i(add|sub|mul|truediv|pow|matmul|and|or)__|__setitem__")
RULES: dict[Any, Callable[..., Any]] = {}
"""By a function of torch: computes it with the measured weights as constants and records them, or NotImplemented."""
PARTS: dict[Any, Callable[..., Any]] = {}
"""By a function of torch: computes it by other functions, which are seen in its place, or NotImplemented."""


def rule(*functions: Any) -> Callable[[Any], Any]:
    """Register a rule for these functions of torch."""
    return _registered(RULES, functions)


def in_parts(*functions: Any) -> Callable[[Any], Any]:
    """Register what takes these functions of torch apart."""
    return _registered(PARTS, functions)


def _registered(table: dict[Any, Callable[..., Any]], functions: Sequence[Any]) -> Callable[[Any], Any]:
    def register(handler: Any) -> Any:
        table.update(dict.fromkeys(functions, handler))
        return handler

    return register


class Capture(TorchFunctionMode):
    """Catches layers during a forward pass of `samples` samples.

    Args:
        params: the measured parameters; where `fixed`, they must not require a gradient during the pass.
        scaled: what grows with the number of samples, as `find_scaled` gives it; None only records `calls`.
        plan: where the samples are, as `find_plan` gives it; None only records `probes`.
        taps: whether the derivatives of inputs will be wanted; Gauss-Newton matrices have none.
        lift: lift every parameter, rules or not.
        owners: of a batch with graphs, the sample of each of its rows, as `batches.owners` gives it.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        samples: int,
        scaled: list[Scaled] | None = None,
        plan: Plan | None = None,
        taps: bool = True,
        lift: bool = False,
        owners: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.taps = taps
        self.samples = samples
        self.fixed = not (scaled is None and plan is None)
        self.sites: list[Any] = []
        self._owners = {kind: owner.to(params[0].device) for kind, owner in (owners or {}).items()}
        self._scaled, self._plan, self._lift_all = plan.scaled if plan else scaled, plan, lift
        self._calls: list[Call] = []
        self._probes: list[Probe] = []
        self._probed = 0  # tensors whose place the plan gave
        self._now: tuple[list[Any], Scaled] = ([], Scaled([], []))  # the arguments of the call, and what grows in it
        # By id: a tensor computed from parameters alone, and the same of each sample's own copies of them.
        self._derived: dict[int, tuple[Tensor, Tensor | None]] = {}
        # By id: a tensor whose samples were put in another order, or one of a packed sequence; the sample of each row.
        self.rows: dict[int, tuple[Tensor, Tensor]] = {}
        self._params = params
        # The parameters in a storage, with their places there: several may be parts of one vector.
        self._where: dict[int, list[tuple[int, int, int]]] = {}
        for i, param in enumerate(params):
            self._where.setdefault(_storage(param), []).append((*_extent(param), i))
        self._c = compiled()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        call = tree_flatten((args, kwargs))
        if getattr(func, "__name__", "") == "__get__":  # an attribute, which code may ask for in one pass alone
            asked = any(id(leaf) in self._derived for leaf in call[0])
            known = Scaled([None] * len(call[0]), [None])
            return self._of_parameters(func, call, known) if asked else func(*args, **kwargs)
        index = len(self._calls)
        self._calls.append(Call([], []))
        if func in PARTS:
            result = PARTS[func](self, *args, **kwargs)
            if result is not NotImplemented:
                return result
        if self._scaled is None:
            result = func(*args, **kwargs)
            self._calls[index] = Call(_shapes(call[0]), _shapes(tree_flatten(result)[0]))
            return result
        if index >= len(self._scaled):
            raise UncoveredError("a forward pass that takes other steps for other samples")
        self._now = call[0], self._scaled[index]
        derived = any(id(leaf) in self._derived for leaf in call[0])
        if func in RULES and not derived and not self._lift_all:
            result = RULES[func](self, *args, **kwargs)
            if result is not NotImplemented:
                return result
        if not derived and not self.owns(*call[0]):
            return func(*args, **kwargs)
        return self._of_parameters(func, call, self._scaled[index])

    @property
    def seen(self) -> Seen:
        """What was seen of the pass, without a plan."""
        return Seen(self.samples, self._calls, self._probes, self._owners)

    def grows(self, tensor: Any) -> int | None:
        """The dimension of an argument of the present call that grows with the number of samples."""
        leaves, scaled = self._now
        dims = [dim for leaf, dim in zip(leaves, scaled.arguments, strict=False) if leaf is tensor]
        return dims[0] if dims else None

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

    def uses(self, kind: str, view: Tensor | None, *settings: Any) -> list[Any]:
        """The use of a parameter, where it is one."""
        return [self.use(kind, view, *settings)] if view is not None and self.owns(view) else []

    def use(self, kind: str, view: Tensor, *settings: Any) -> Any:
        """The use of a parameter through a view of it, in a layer of this kind with these settings."""
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
                if kind not in ("Scale", "Shift"):
                    raise UncoveredError(f"{kind} with an expanded parameter")
                sizes[i] = 1
        if kind in ("Scale", "Shift"):  # leading ones only broadcast
            filled = next((i for i, size in enumerate(sizes) if size > 1), len(sizes))
            sizes, strides = sizes[filled:], strides[filled:]
        layer = getattr(self._c, kind)
        return layer(self._c.View(index, sizes, strides, offset), *settings)

    # --- Sites

    def tapped(self, a: Tensor) -> tuple[Tensor, Tensor | None]:
        """The input with its tap; without one where it is a constant."""
        if self._plan is None or not self.taps or not a.requires_grad:
            return a, None
        tapped, eta = self._c.tap(a)
        return tapped, eta

    def site(
        self,
        z: Tensor,
        uses: list[Any],
        a: Tensor | None = None,
        eta: Tensor | None = None,
        owner: Tensor | None = None,
    ) -> Tensor:
        """Records z = uses . a, with the samples where they are in a. Returns z.

        Args:
            owner: the sample of each row, where that is known.
        """
        if owner is not None:
            return self._site_of_rows(z, uses, a, eta, 0, owner) if self._plan else _followed(z)
        shown = z if a is None else a
        if self._plan is None:
            self._probes.append(Probe(shown.detach().clone()))
            return _followed(z)
        owner = self._plan.owner(self._probed, shown, self._owners)
        layout = self._layout(shown)
        if owner is None or layout is None:
            return self._site(z, uses, a, eta, layout)
        return self._site_of_rows(z, uses, a, eta, layout[0], owner)

    def _site_of_rows(
        self, z: Tensor, uses: list[Any], a: Tensor | None, eta: Tensor | None, dim: int, owner: Tensor
    ) -> Tensor:
        most, places = _places(owner, self.samples)
        return self._site(z, uses, a, eta, (dim, 1, self.samples, most), places)

    def _site(
        self,
        z: Tensor,
        uses: list[Any],
        a: Tensor | None,
        eta: Tensor | None,
        layout: Layout | None,
        places: Tensor | None = None,
    ) -> Tensor:
        z = _followed(z)
        site = self._c.Site(a, eta, z, layout, places)
        for use in uses:
            site.add(use)
        self.sites.append(site)
        return z

    def _layout(self, value: Tensor) -> Layout | None:
        """Where the samples are in the tensor that is probed next."""
        assert self._plan is not None
        layout = self._plan.layout(self._probed, value, self.samples)
        self._probed += 1
        return layout

    # --- What is lifted

    def own(self, z: Tensor, use: Any, a: Tensor) -> Tensor:
        """Records a tensor that is the same for all samples: its own for each of them from here on. Returns it.

        Args:
            z: use . a
        """
        lifted = None
        if self._plan is not None:
            rows, each = (t.unsqueeze(0).expand(self.samples, *t.shape).clone() for t in (a, z))
            lifted = self._site(each, [use], rows, None, self._first)
        self._derived[id(z)] = z, lifted
        return z

    @property
    def _first(self) -> Layout:
        return 0, 1, self.samples, 1

    def _lifted(self, leaf: Tensor) -> Tensor | None:
        """What each sample has of a tensor that is computed from parameters: (samples, ...); None of another one."""
        if id(leaf) in self._derived:
            return self._derived[id(leaf)][1]
        if self.owner(leaf) is None:
            return None
        own = leaf.unsqueeze(0).expand(self.samples, *leaf.shape).clone()
        return self._site(own, [self.use("Shift", leaf)], None, None, self._first)

    def _of_parameters(self, func: Any, call: tuple[list[Any], Any], scaled: Scaled) -> Any:
        """A function of parameters, or of what is computed from them, and perhaps of samples."""
        args, kwargs = tree_unflatten(call[0], call[1])
        if _IN_PLACE.fullmatch(getattr(func, "__name__", "")):
            raise UncoveredError(_name(func))
        try:
            with torch.set_grad_enabled(self._plan is None):  # with a plan, the result comes from each sample's own
                result = func(*args, **kwargs)
        except RuntimeError as error:  # such as autograd.grad by a parameter, which is a constant here
            raise UncoveredError(_name(func)) from error
        results, form = tree_flatten(result)
        tensors = [(part, dim) for part, dim in zip(results, scaled.results, strict=False) if isinstance(part, Tensor)]
        if all(dim is None and self.owner(part) is not None for part, dim in tensors):
            return result  # views of parameters
        if AMBIGUOUS in scaled.results or AMBIGUOUS in scaled.arguments:
            raise UncoveredError(f"{_name(func)} of other rows than samples")
        if self._plan is None:
            self._look(call[0], scaled, results)
            return tree_unflatten(results, form)
        each = self._each(func, call, scaled)
        for i, ((part, dim), own) in enumerate(zip(tensors, each, strict=True)):
            if dim is None:
                self._derived[id(part)] = part, own
            else:
                results[i] = _joined(own, self._layout(part))
        return tree_unflatten(results, form)

    def _look(self, leaves: list[Any], scaled: Scaled, results: list[Any]) -> None:
        """Record what decides where the samples are."""
        for leaf, dim in zip(leaves, scaled.arguments, strict=False):
            if isinstance(leaf, Tensor) and id(leaf) not in self._derived and self.owner(leaf) is None:
                self._probes.append(Probe(leaf.detach().clone(), constant=dim is None))
        for i, (part, dim) in enumerate(zip(results, scaled.results, strict=False)):
            if isinstance(part, Tensor) and dim is None:
                self._derived[id(part)] = part, None
            elif isinstance(part, Tensor):
                self._probes.append(Probe(part.detach().clone()))
                results[i] = _followed(part.clone())  # no view of a parameter from here on

    def _each(self, func: Any, call: tuple[list[Any], Any], scaled: Scaled) -> list[Tensor]:
        """What a function gives for each sample: (samples, ...), as for a batch of one."""
        fixed, places, parts, dims = list(call[0]), [], [], []
        for i, (leaf, dim) in enumerate(zip(call[0], scaled.arguments, strict=False)):
            if not isinstance(leaf, Tensor):
                fixed[i] = leaf // self.samples if dim is True else leaf
                continue
            own = self._lifted(leaf)
            layout = self._layout(leaf) if own is None else self._first
            places.append(i)
            parts.append(own if own is not None else leaf if layout is None else _split(leaf, layout))
            dims.append(None if layout is None else 0)

        def one(*parts: Tensor) -> Any:
            for i, part in zip(places, parts, strict=True):
                fixed[i] = part
            args, kwargs = tree_unflatten(fixed, call[1])
            return func(*args, **kwargs)

        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "There is a performance drop")
                return tree_flatten(torch.vmap(one, in_dims=tuple(dims))(*parts))[0]
        except (RuntimeError, ValueError, TypeError, IndexError) as error:  # what vmap cannot do
            raise UncoveredError(_name(func)) from error


def _places(owner: Tensor, samples: int) -> tuple[int, Tensor]:
    """(The most rows that a sample has, the place of each row where every sample has so many)."""
    counts = torch.bincount(owner, minlength=samples)
    most = int(counts.max())
    order = owner.argsort(stable=True)
    within = torch.empty_like(owner)
    starts = counts.cumsum(0) - counts
    within[order] = torch.arange(len(owner), device=owner.device) - starts[owner[order]]
    return most, owner * most + within


def _followed(z: Tensor) -> Tensor:
    """A tensor that autograd follows, as it does where the weights are no constants."""
    if z.requires_grad or not z.is_floating_point():
        return z
    return z + z.new_zeros(()).requires_grad_()


def _shapes(leaves: list[Any]) -> list[Any]:
    """Of each leaf its shape, or itself where it is an integer."""
    return [tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf if type(leaf) is int else None for leaf in leaves]


def _split(t: Tensor, layout: Layout) -> Tensor:
    """The part of each sample, with as many dimensions: (samples, ...)."""
    dim, *sizes = layout
    apart = t.reshape(*t.shape[:dim], *sizes, *t.shape[dim + 1 :])
    return apart.movedim(dim + 1, 0).flatten(dim + 1, dim + 2)


def _joined(t: Tensor, layout: Layout | None) -> Tensor:
    """The inverse of `_split`."""
    assert layout is not None
    dim, outer, _, inner = layout
    apart = t.reshape(*t.shape[: dim + 1], outer, inner, *t.shape[dim + 2 :])
    return apart.movedim(0, dim + 1).flatten(dim, dim + 2)


def _storage(tensor: Tensor) -> int:
    """What a tensor has in common with its views; not the address of the memory, which devices need not tell."""
    address: int = tensor.untyped_storage()._cdata
    return address


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The first element of its storage that a tensor has, and the one behind the last."""
    first = int(tensor.storage_offset())
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + (int(reach) + 1 if tensor.numel() else 0)


def _name(func: Any) -> str:
    return str(resolve_name(func) or getattr(func, "__name__", func))
