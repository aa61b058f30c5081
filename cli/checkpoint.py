"""Anyone's checkpoint, for `samlite sharpness`: weights are read as tensors only, nothing in the file is executed."""

import importlib
import json
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from samlite.batches import described, is_pair
from samlite.curvature.criterion import LOSSES
from samlite.curvature.stream import checked_data
from samlite.errors import UsageError, shortened
from samlite.named import called, resolve
from samlite.training.config import usable_device
from samlite.training.measurements import Subject, drawn
from samlite.training.runs import CONFIG
from samlite.training.weights import FOLDER_FILES, load_weights_into

_IGNORED = -100  # labels that do not count, as transformers has it


def checkpoint_subject(
    path: Path,
    model: str,
    data: str,
    loss: str = "cross_entropy",
    samples: int | None = None,
    device: str | None = None,
    weights: str | None = None,
) -> Subject:
    """The weights in a file, or in a folder of Hugging Face's layout, in the module that `model` names.

    Args:
        model: as of `build_model`.
        data: names an (inputs, targets) pair, a re-iterable of batches, or a function that returns one.
        loss: ``cross_entropy``, ``mse``, ``model`` for the loss that the model returns of a batch by keywords, or names
            a loss module or a function of (model, batch).
        samples: so many rows of the pair, drawn at random but always the same.
        weights: names the weights, where the file holds several that fit.
    """
    module = build_model(model, path)
    folder = path if path.is_dir() else path.parent
    if model == "hf:" and (path.is_dir() or path.name in FOLDER_FILES):
        module = _load_by_transformers(module, folder)
    else:
        for line in load_weights_into(module, path, weights):
            click.echo(line, err=True)
    module.to(usable_device(device or "cpu"))
    criterion = _own_loss if loss == "model" else LOSSES[loss]() if loss in LOSSES else resolve(loss, "--loss")
    batches = checked_data(_build(data, "--data"))
    if not is_pair(batches):
        if samples is not None:
            raise UsageError("--samples needs --data to name a pair of tensors; limit the batches themselves")
        return Subject(module, criterion, batches, None, None)
    available = len(batches[0])
    pair = batches if samples is None else drawn(batches, samples, seed=0)
    return Subject(module, criterion, pair, len(pair[0]), available)


def build_model(name: str, path: Path) -> nn.Module:
    """A module by its name.

    ``pkg.mod:factory`` names one, or a function without arguments that returns one; ``timm:NAME,num_classes=10`` is
    timm's, with arguments; ``hf:FOLDER`` is what the config.json in the folder describes, by default that of the
    checkpoint.
    """
    library, _, rest = name.partition(":")
    if library == "hf":
        return _of_transformers(Path(rest) if rest else path if path.is_dir() else path.parent)
    if library == "timm":
        return _of_timm(rest)
    module = _build(name, "--model")
    if not isinstance(module, nn.Module):
        raise UsageError(f"--model must name a torch.nn.Module or a function that returns one, got {name!r}")
    return module


def _of_transformers(folder: Path) -> nn.Module:
    """The module that a config describes, with weights at random."""
    transformers = _imported("transformers", "hf:")
    if not (folder / CONFIG).is_file():
        raise UsageError(f"--model hf: needs a {CONFIG}, got none in {folder}; give hf:FOLDER")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        kind = getattr(transformers, config.architectures[0]) if config.architectures else transformers.AutoModel
        return kind.from_config(config) if kind is transformers.AutoModel else kind(config)
    except Exception as error:  # a config that transformers does not know
        raise UsageError(f"--model hf: {folder / CONFIG} failed with {_reason(error)}") from error


def _load_by_transformers(module: nn.Module, folder: Path) -> nn.Module:
    """The module with the weights in its own folder, whose names transformers may translate; all of them or none."""
    try:
        loaded, found = type(module).from_pretrained(  # type: ignore[attr-defined]
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # damaged files, shapes that do not fit
        raise UsageError(
            f"{folder} must hold the weights of --model hf:, but loading failed with {_reason(error)}"
        ) from error
    wrong = {what: sorted(map(str, found.get(f"{what}_keys", ()))) for what in ("missing", "unexpected", "mismatched")}
    for what, names in wrong.items():
        if names:
            raise UsageError(f"{folder} must hold all weights of --model hf:, got {what} {shortened(names, 3)}")
    return loaded  # type: ignore[no-any-return]


def _of_timm(name: str) -> nn.Module:
    timm = _imported("timm", "timm:")
    name, *settings = name.split(",")
    pairs = [setting.partition("=") for setting in settings]
    for key, _, value in pairs:
        if not (key.isidentifier() and value):
            raise UsageError(f"--model timm:NAME must be followed by key=value, got {key!r}")
    try:
        return timm.create_model(name, pretrained=False, **{key: _value(value) for key, _, value in pairs})
    except Exception as error:  # a name or an argument that timm does not know
        raise UsageError(f"--model timm:{name} failed with {_reason(error)}") from error


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _imported(package: str, what: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UsageError(f"--model {what} needs {package}, got {_reason(error)}; pip install {package}") from error


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _own_loss(model: nn.Module, batch: Any) -> Any:
    """The loss that the model itself returns of a batch, as those of transformers do."""
    if not hasattr(batch, "keys"):
        raise UsageError(f"--loss model needs batches that are dictionaries, got {described(batch)}")
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise UsageError("--loss model needs a model that returns a loss, got none; give labels in the batches")
    labels = batch.get("labels")
    if labels is None or labels.is_floating_point():
        return loss
    if getattr(getattr(model, "loss_function", None), "__name__", "") == "ForCausalLMLoss":
        labels = labels[..., 1:]  # the first token is not predicted
    return loss, (labels != _IGNORED).sum()


def _build(name: str, option: str) -> Any:
    """The named object, or what the named function returns."""
    named = resolve(name, option)
    return named if isinstance(named, nn.Module) or not callable(named) else called(name, option)
