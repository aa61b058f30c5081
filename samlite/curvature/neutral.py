"""Conditions that torch can switch on around a measurement, and that would enter its derivatives."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from samlite.curvature.compiled import compiled
from samlite.errors import UsageError


def check_real() -> None:
    """Raise UsageError in a transform of torch.func and under fake tensors, where no number can be read."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise UsageError("samlite cannot measure inside a transform of torch.func (grad, vmap, ...); call it outside")
    if any(type(mode).__name__ == "FakeTensorMode" for mode in _get_current_dispatch_mode_stack()):
        raise UsageError("samlite cannot measure under FakeTensorMode, whose tensors hold no values; call it outside")


@contextmanager
def neutral(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Undo whatever is switched on around this call and would enter the derivatives by these parameters."""
    check_real()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for kind in {"cpu", parameters[0].device.type}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.is_anomaly_enabled():
            stack.enter_context(torch.autograd.set_detect_anomaly(False))
        stack.enter_context(_full_precision())
        stack.enter_context(_tensors_saved_as_they_are())
        stack.enter_context(without_hooks(parameters))
        yield


@contextmanager
def _full_precision() -> Iterator[None]:
    """No TF32 or bfloat16 inside of products, which makes those of a Hessian inexact and asymmetric.

    torch has two generations of switches. Where they contradict each other, torch cannot read the older ones, and code
    that does so fails (`torch.backends.cudnn.flags`); so both are set.
    """
    parts = [getattr(getattr(torch.backends, kind), part, None) for kind, part in _ROUNDING]
    newer: list[Any] = [part for part in parts if hasattr(part, "fp32_precision")]
    before = [part.fp32_precision for part in newer]
    matmul, convolution = _read(torch.get_float32_matmul_precision), _read(torch._C._get_cudnn_allow_tf32)
    try:
        torch.set_float32_matmul_precision("highest")
        torch._C._set_cudnn_allow_tf32(False)
        for part in newer:
            part.fp32_precision = "ieee"
        yield
    finally:
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if convolution is not None:
            torch._C._set_cudnn_allow_tf32(convolution)
        for part, precision in zip(newer, before, strict=True):
            part.fp32_precision = precision


_ROUNDING = [("cuda", "matmul"), *((kind, part) for kind in ("cudnn", "mkldnn") for part in ("matmul", "conv", "rnn"))]


def _read(switch: Callable[[], Any]) -> Any:
    """What an older switch says; None if the newer ones contradict it."""
    try:
        return switch()
    except RuntimeError:
        return None


@contextmanager
def _tensors_saved_as_they_are() -> Iterator[None]:
    """No hooks on the tensors that autograd saves, which may round or move them."""
    hooks = compiled().take_saved_tensor_hooks()
    try:
        yield
    finally:
        compiled().restore_saved_tensor_hooks(hooks)


@contextmanager
def without_hooks(parameters: Sequence[Tensor]) -> Iterator[None]:
    """No hooks on the gradients of these leaves, which would change or record every derivative."""
    before = [parameter._backward_hooks for parameter in parameters]
    try:
        for parameter, hooks in zip(parameters, before, strict=True):
            if hooks:
                parameter._backward_hooks = None
        yield
    finally:
        for parameter, hooks in zip(parameters, before, strict=True):
            if parameter._backward_hooks is not hooks:
                parameter._backward_hooks = hooks
