"""Functions of torch without the right second derivative, replaced under whatever name a model has imported them."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class AllDouble(TorchFunctionMode):
    """Ignores casts to float32, as norms and rotary embeddings make them, where all else is in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.float:
            func = Tensor.double
        if any(value is torch.float32 for value in (*args, *kwargs.values())):
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in kwargs.items()}
        return func(*args, **kwargs)


class _Direct:
    """Stands in for checkpointing, which recomputes outside of all this: the function is called once."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return function(*args)

    @staticmethod
    def generator(*args: Any, **kwargs: Any) -> Iterator[None]:
        yield


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """torch's own is one operation, whose second derivative is wrong."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


_GENERATOR = "_checkpoint_without_reentrant_generator"
_STAND_INS: tuple[tuple[str, str, Any], ...] = (  # where they are: versions of torch differ
    ("torch.utils.checkpoint", "CheckpointFunction", _Direct),
    ("torch.utils.checkpoint", _GENERATOR, _Direct.generator),
    ("torch.utils.checkpoint", f"{_GENERATOR}_impl", _Direct.generator),
    ("torch.distributed._composable.checkpoint_activation", _GENERATOR, _Direct.generator),
    ("torch.distributed._composable.checkpoint_activation", f"{_GENERATOR}_impl", _Direct.generator),
    ("torch", "_weight_norm", _weight_norm),
    ("torch.nn.utils.weight_norm", "_weight_norm", _weight_norm),
)
_lock, _depth = threading.Lock(), 0
_replaced: list[tuple[Any, str, Any]] = []


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Replace these functions where torch itself looks them up."""
    global _depth
    with _lock:
        _depth += 1
        if _depth == 1:
            known = [(sys.modules.get(place), name, other) for place, name, other in _STAND_INS]
            there = [(place, name, other) for place, name, other in known if hasattr(place, name)]
            _replaced[:] = [(place, name, getattr(place, name)) for place, name, _ in there]
            for place, name, other in there:
                setattr(place, name, other)
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                for place, name, original in _replaced:
                    setattr(place, name, original)
