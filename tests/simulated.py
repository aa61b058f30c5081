"""A device that is not the CPU, for machines without one: its tensors live in CPU memory, but torch does not know.

    python tests/simulated.py NAME...

runs these checks of test_devices.py on it and prints their results. Every operation of torch on its tensors comes to
`_run` below, which refuses a tensor of another device beside them, as CUDA does. A wrapper has no memory: `_HELD` finds
the CPU tensor behind it by its storage, which shallow copies share. A view has a storage of its own, so layers that
look at a view of a parameter, such as batch norm, are measured the slow way. It is a process of its own, since torch
takes such a device for good.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_flatten, tree_unflatten

NAME = "simulated"
# Operations that torch would put together from strides or from an output of size 0, which wrappers do not have.
WHOLE = (
    *("abs", "sgn", "sign", "logical_not", "bitwise_not", "remainder.Scalar", "index.Tensor"),
    *("arange", "arange.start", "arange.start_step"),
    *("alias", "detach", "diagonal", "expand", "permute", "select.int", "slice.Tensor", "split.Tensor"),
    *("split_with_sizes", "squeeze", "squeeze.dim", "squeeze.dims", "t", "transpose.int", "unbind.int", "unfold"),
    "unsqueeze",
)

_HELD: dict[int, tuple[Tensor, Any]] = {}  # by the address of a wrapper's storage, which is kept with it


class _Wrapper(Tensor):
    """So that a parameter made of it is one that torch leaves as it is."""

    __torch_function__ = torch._C._disabled_torch_function_impl


class _Backend(backend_registration._DummyBackendModule):  # type: ignore[name-defined, misc, unused-ignore]
    """What torch asks of a device's module."""

    def get_rng_state(self, *device: Any) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, *device: Any) -> None:
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def _on_device(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == NAME


def _held(wrapper: Tensor) -> Tensor:
    return _HELD[wrapper.untyped_storage()._cdata][0]


def _wrapped(held: Tensor) -> Tensor:
    wrapper: Tensor = torch._C._acc.create_empty_tensor(tuple(held.shape), held.dtype)
    wrapper.__class__ = _Wrapper
    storage = wrapper.untyped_storage()
    _HELD[storage._cdata] = held, storage
    return wrapper


def _run(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """The operation on the CPU tensors behind the wrappers; what it wrote into comes back as the same wrapper."""
    flat, structure = tree_flatten((args, kwargs))
    wrappers: dict[int, Tensor] = {}
    there = []
    for value in flat:
        if _on_device(value):
            wrappers[id(_held(value))] = value
            there.append(_held(value))
        elif isinstance(value, torch.device):
            there.append(torch.device("cpu"))
        elif isinstance(value, Tensor) and value.dim() and "copy" not in operation.__name__:
            raise RuntimeError(f"all tensors must be on one device, got {value.device} beside {NAME} in {operation}")
        else:
            there.append(value)
    args, inside = tree_unflatten(there, structure)
    with torch.no_grad():
        results, structure = tree_flatten(operation(*args, **inside))
    if "_to_copy" in operation.__name__ and torch.device(kwargs.get("device") or NAME).type == "cpu":
        return results[0]
    back = [
        wrappers.get(id(one)) if id(one) in wrappers else _wrapped(one) if isinstance(one, Tensor) else one
        for one in results
    ]
    return tree_unflatten(back, structure)


def _copy(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    held = [_held(tensor) if _on_device(tensor) else tensor for tensor in (source, target)]
    with torch.no_grad():
        held[1].copy_(held[0])
    return target


def _read(wrapper: Tensor) -> Any:
    return _held(wrapper).item()


def _convolution(*args: Any) -> Any:
    return _run(torch.ops.aten.convolution.default, *args)


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> Any:
    *geometry, mask = rest
    return _run(torch.ops.aten.convolution_backward.default, grad, x, weight, None, *geometry, mask)


def _view(x: Tensor, size: Any, *strides: Any) -> Tensor:
    return _run(torch.ops.aten.reshape.default, x, size)  # the tensor behind may have other strides


def _as_strided(x: Tensor, size: Any, stride: Any, offset: int | None = None) -> Tensor:
    def strided(held: Tensor) -> Tensor:  # a wrapper starts where its storage does
        assert held.is_contiguous(), "strides are those of the wrapper"
        return held.as_strided(size, stride, held.storage_offset() + (offset or 0))

    result: Tensor = _run(strided, x)
    return result


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """Torch's own changes the shape of a result in place, which a wrapper cannot."""
    if a.dim() == 1 and b.dim() == 2:
        return torch.mm(a.unsqueeze(0), b).squeeze(0)
    product: Tensor = torch.ops.aten.matmul.default.decompose(a, b)
    return product


def _lstm_cell(x: Tensor, h: Tensor, c: Tensor, *biases: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Fused on every device but the CPU."""
    gates = x + h + sum(bias for bias in biases if bias is not None)
    i, f, g, o = gates.chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c, gates


def register() -> list[torch.library.Library]:
    """Make the device known; what is returned must be kept."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Backend())
    every, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(_run, "PrivateUse1")
    own: dict[str, Callable[..., Any]] = {
        "_copy_from": _copy,
        "_local_scalar_dense": _read,
        "as_strided": _as_strided,
        "view": _view,
        "_reshape_alias": _view,
        "_unsafe_view": _view,
        "convolution_overrideable": _convolution,
        "convolution_backward_overrideable": _convolution_backward,
    }
    for name in WHOLE:
        packet, _, overload = name.partition(".")
        operation = getattr(getattr(torch.ops.aten, packet), overload or "default")
        own[name] = lambda *args, _operation=operation, **kwargs: _run(_operation, *args, **kwargs)
    for name, function in own.items():
        aten.impl(name, function, "PrivateUse1")
    for key in ("AutogradPrivateUse1", "PrivateUse1"):
        aten.impl("_thnn_fused_lstm_cell", _lstm_cell, key)
        aten.impl("matmul", _matmul, key)
    return [every, aten]


def main() -> None:
    kept = register()
    from test_devices import CHECKS

    found = {}
    for name in sys.argv[1:]:
        try:
            found[name] = CHECKS[name](f"{NAME}:0")
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(found))
    del kept


if __name__ == "__main__":
    main()
