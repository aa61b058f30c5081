"""Tensors in files: checkpoints and weights, read without executing anything."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save
from torch import Tensor, nn

from samlite.errors import UsageError
from samlite.files import regular, replacing


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values, from which `load_checkpoint` returns the same."""
    with replacing(path) as beside, open(beside, "wb") as file:  # a handle: the bytes do not hold the name
        torch.save(state, file)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a file of tensors and plain values onto the CPU; nothing in it is executed.

    Raises UsageError where the file is damaged or holds anything else.
    """
    with open(regular(path), "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about old pickles; what matters is an error
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # damage shows as many kinds of error
            raise UsageError(
                f"{path} must be a checkpoint of tensors and plain values, but it cannot be read: "
                "it is truncated, damaged, or holds code"
            ) from error
    if not isinstance(state, dict):
        raise UsageError(f"{path} must hold a dictionary, got {type(state).__name__}")
    return state


def save_model_weights(path: Path, model: nn.Module) -> None:
    """Write a module's weights as safetensors; a tied weight is kept once and stays tied."""
    state: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        state.setdefault(id(tensor), (name, tensor.detach().contiguous()))
    save_tensors(path, dict(state.values()))


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write contiguous tensors by name as safetensors, which `load_weights` reads."""
    with replacing(path) as beside:
        beside.write_bytes(save(tensors))


def load_model_weights(path: Path, model: nn.Module) -> None:
    """Read the weights that `save_model_weights` wrote. Raises UsageError where they do not fit."""
    check_types(model, load_weights(path), path)
    try:
        load_model(model, path)
    except (SafetensorError, RuntimeError) as error:
        raise UsageError(f"{path} does not hold the weights of this run's network: {_reason(error)}") from None


def load_weights(path: Path) -> dict[str, Tensor]:
    """The tensors that `save_tensors` wrote. Raises UsageError where the file is damaged."""
    try:
        return load_file(regular(path))
    except SafetensorError as error:
        raise UsageError(f"{path} must be a safetensors file: {_reason(error)}") from None


def check_types(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Raise UsageError where torch would convert numbers to another kind: complex ones to their real part, say."""
    for name, tensor in model.state_dict().items():
        if name in weights and isinstance(tensor, Tensor) and _kind(weights[name]) != _kind(tensor):
            raise UsageError(f"{path} must hold {name} as {_kind(tensor)} numbers, got {weights[name].dtype}")


def _kind(tensor: Tensor) -> str:
    if tensor.layout != torch.strided or tensor.is_quantized:
        return "sparse or quantized"
    return "complex" if tensor.is_complex() else "floating-point" if tensor.is_floating_point() else "whole"


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())
