"""Which parameters of a model are measured, and whether they can be."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from samlite.errors import require


def bare(model: nn.Module) -> nn.Module:
    """The module inside wrappers that compile it or train it on several devices."""
    while True:
        if isinstance(model, DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner  # of torch.compile
        else:
            return model


def _check_values(name: str, p: Tensor) -> None:
    """Raise UsageError unless a parameter is a plain tensor with values."""
    rule = f"parameters must be plain tensors with values, got {name}"
    require(not is_lazy(p), f"{rule} not initialised yet; run the model once")
    require(p.device.type != "meta", f"{rule} on the meta device; load the weights first")
    require(
        not p.is_inference(), f"{rule} made in inference mode, which autograd cannot use; copy the model outside it"
    )
    kind = type(p.data).__name__
    require(kind != "FakeTensor", f"{rule} as a FakeTensor; measure the real model")
    require(
        kind != "DTensor" and not hasattr(p, "_is_flat_param") and kind != "FlatParameter",
        f"{rule} in shards (FSDP or tensor parallel); load the full state_dict into a model that is not wrapped",
    )


def selected(
    model: nn.Module, loss_fn: Any, params: str | Iterable[str] | Iterable[nn.Parameter] | None
) -> tuple[list[str], list[nn.Parameter]]:
    """Names and parameters to measure, each tied one once. Those of a loss module are named criterion.NAME."""
    named = dict(model.named_parameters(remove_duplicate=False))
    for name, p in named.items():
        _check_values(name, p)
    if params is not None and isinstance(loss_fn, nn.Module):
        own = {id(p) for p in named.values()}
        named |= {f"criterion.{name}": p for name, p in loss_fn.named_parameters() if id(p) not in own}
    if params is None:
        chosen = {name: p for name, p in named.items() if p.requires_grad}
        require(bool(chosen), "model must have parameters that require a gradient, got none")
    else:
        items = [params] if isinstance(params, str) else list(params)
        patterns = [item for item in items if isinstance(item, str)]
        tensors = {id(item) for item in items if isinstance(item, Tensor)}
        chosen = {
            name: p
            for name, p in named.items()
            if id(p) in tensors or any(fnmatchcase(name, pattern) for pattern in patterns)
        }
        known = ", ".join(list(named)[:6]) + (", ..." if len(named) > 6 else "")
        for pattern in patterns:
            require(
                any(fnmatchcase(name, pattern) for name in named),
                f"params must match parameter names, got {pattern!r}; the model has {known}",
            )
        require(
            bool(chosen) and tensors <= {id(p) for p in chosen.values()},
            f"params must be parameters of the model or patterns of their names; the model has {known}",
        )
        frozen = [name for name, p in chosen.items() if not p.requires_grad]
        if tensors or len(frozen) == len(chosen):
            require(not frozen, f"params must require a gradient, got {', '.join(frozen)} without")
        chosen = {name: p for name, p in chosen.items() if p.requires_grad}
    unique: dict[int, tuple[str, nn.Parameter]] = {}
    for name, p in chosen.items():
        unique.setdefault(id(p), (name, p))
    names, parameters = [name for name, _ in unique.values()], [p for _, p in unique.values()]
    kinds = {p.dtype for p in parameters}
    require(
        len(kinds) == 1 and parameters[0].dtype in (torch.float32, torch.float64),
        f"the measured parameters must all be float32, or all float64, got {', '.join(sorted(map(str, kinds)))}",
    )
    broken = [name for name, p in zip(names, parameters, strict=True) if not p.detach().isfinite().all()]
    require(not broken, f"the weights must be finite, got nan or inf in {', '.join(broken)}")
    return names, parameters
