"""Records how parameters act on samples during one forward pass, for per-sample Hessian chains.

A torch-function mode catches each layer at the function, so functional code and tied weights are seen like modules.
The weights are constants of the pass; every layer's input gets a tap, and its output's gradient edge is taken at once.
Fused recurrent and attention functions are taken apart, so that their layers are seen. Anything else that touches a
measured parameter raises `UncoveredError` with its name: never a silently wrong number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from samlite.batches import tensors
from samlite.curvature.capture.plan import Plan, Probe, Seen, UncoveredError
from samlite.curvature.compiled import compiled

RULES: dict[Any, Callable[..., Any]] = {}
"""By a function of torch: computes it with the measured weights as constants and records them, or NotImplemented."""


def rule(*functions: Any) -> Callable[[Any], Any]:
    """Register a rule for these functions of torch."""

    def register(handler: Any) -> Any:
        RULES.update(dict.fromkeys(functions, handler))
        return handler

    return register


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
        self.shared: dict[int, tuple[Tensor, Tensor, Any]] = {}  # such (output, rows, use), by the output's id
        self._c = compiled()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        handler = RULES.get(func)
        if handler is not None:
            result = handler(self, *args, **kwargs)
            if result is not NotImplemented:
                return result
        touched = self.owns(*tensors((args, kwargs)))
        pending = next((t for t in tensors((args, kwargs)) if id(t) in self.shared), None)
        result = func(*args, **kwargs)
        if pending is not None:
            self._follow(func, pending, result)
        for tensor in tensors(result):
            if touched and self.owner(tensor) is None:
                raise UncoveredError(_name(func))
        if touched and getattr(func, "__name__", "").endswith("_") and not func.__name__.startswith("__"):
            raise UncoveredError(_name(func))
        return result

    @property
    def seen(self) -> Seen:
        """What was seen of the pass, without a plan."""
        return Seen(self.probes, self.lookups, self.samples)

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
                if kind not in ("scale", "shift"):
                    raise UncoveredError(f"{kind} with an expanded parameter")
                sizes[i] = 1
        if kind in ("scale", "shift"):  # leading ones only broadcast
            filled = next((i for i, size in enumerate(sizes) if size > 1), len(sizes))
            sizes, strides = sizes[filled:], strides[filled:]
        layer = getattr(self._c, kind.capitalize())
        return layer(self._c.View(index, sizes, strides, offset), *settings)

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
        _, rows, use = self.shared[id(source)]
        same_rows = result.shape[-1] == source.shape[-1] and result.numel() == source.numel()
        if not same_rows or _storage(result) != _storage(source):
            raise UncoveredError(f"{_name(func)} of an embedding that is the same for all samples")
        self.shared[id(result)] = (result, rows.reshape(result.shape[:-1]), use)


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
