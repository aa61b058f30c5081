"""The files of a run: written beside and renamed into place, read without executing anything.

A process that dies at any moment, or a machine that loses power, leaves each file whole: the old one
or the new one.
"""

import fcntl
import json
import math
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save
from torch import Tensor, nn

from samlite.errors import UsageError
from samlite.files import described, regular, replaceable

PATIENCE = 5.0  # seconds to wait for a folder: a killed sweep's last cells need a moment to end


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process alone, creating it. The lock ends with its process, however it ends.

    Raises BlockingIOError where another process holds the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(replaceable(folder / ".lock"), "a") as lock:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BlockingIOError(
                        f"{folder} is in use by another process; wait for it or choose another folder"
                    ) from None
                time.sleep(0.05)
        yield


def claimed(path: Path) -> IO[str] | None:
    """An open file that claims this path until it is closed, or its process ends; None where another has claimed it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(replaceable(path), "a")  # noqa: SIM115  (it stays open)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to; what was written there takes the place of `path` in one step.

    Where that fails, `path` stays as it was and nothing is left beside it. Of several processes one writes after the
    other. Raises UsageError unless `path` is a regular file or not there.
    """
    replaceable(path)
    beside = path.with_name(f".{path.name}.new")
    try:
        with _alone_at(beside):
            try:
                yield beside
                _sync(beside)
                os.replace(beside, path)
            except BaseException:
                beside.unlink(missing_ok=True)
                raise
    except OSError as error:
        if error.errno:
            error.filename = str(path)  # a full disk does not say which file
        raise
    _sync(path.parent)


@contextmanager
def _alone_at(path: Path) -> Iterator[None]:
    """Hold a file for this process alone, creating it; what is there of a process that was killed does not matter."""
    while True:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            path.unlink()
        with open(path, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            there = False
            with suppress(FileNotFoundError):
                there = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
            if there:  # not renamed meanwhile
                yield
                return


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a JSON file in one step."""
    write_text(path, json.dumps(document, indent=2, allow_nan=False) + "\n")


def write_lines(path: Path, documents: Iterable[dict[str, Any]]) -> None:
    """Write a file of JSON objects, one a line, in one step."""
    write_text(path, "".join(json.dumps(document, allow_nan=False) + "\n" for document in documents))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UsageError where the file holds anything else."""
    regular(path)
    try:
        document = parse_json(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UsageError(f"{path} must be a JSON file, but it cannot be read ({error})") from None
    if not isinstance(document, dict):
        raise UsageError(f"{path} must hold a JSON object, got {type(document).__name__}")
    return document


def parse_json(text: str) -> Any:
    """Parse a JSON document as the standard has it: no NaN, no infinity, no field twice. Raises UsageError."""
    try:
        return json.loads(text, parse_float=_finite, parse_constant=_finite, object_pairs_hook=_fields)
    except RecursionError:
        raise UsageError("it is nested too deeply") from None


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise UsageError(f"a number must be finite, got {text[:40]}")
    return number


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise UsageError(f"the field {twice!r} is there twice")
    return fields


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
    """Anyone's weights by name, from a .pt, .pth or .safetensors file; nothing in it is executed.

    A dictionary that nests the weights under "model" or "state_dict" is opened.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(regular(path))
        except SafetensorError as error:
            raise UsageError(f"{path} must be a safetensors file: {_reason(error)}") from None
    state = load_checkpoint(path)
    for key in ("state_dict", "model"):
        if isinstance(state.get(key), dict):
            state = state[key]
    others = [name for name, value in state.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if others or not state:
        found = f"{described(others[0])}: {described(state[others[0]])}" if others else "none"
        raise UsageError(f"{path} must hold named tensors, as model.state_dict() gives them, got {found}")
    return state


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
