"""A task of the user's own: a network by width, splits and a loss, each by the name of what makes it.

The name of such a task says all of it: ``nets:resnet on nets:splits by cross_entropy``. So a config, a sweep and its
report need nothing more to find it again, as long as the modules can be imported from the current folder.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from samlite.batches import described, is_pair
from samlite.curvature.criterion import LOSSES
from samlite.data.tensors import Splits, TensorData, hold_out
from samlite.errors import UsageError
from samlite.models import parameter_count
from samlite.named import called, resolve
from samlite.tasks.metrics import Accuracy
from samlite.tasks.task import Recipe, Task

_NAME = re.compile(r"(\S+:\S+) on (\S+:\S+) by (\S+)")
_RECIPE = Recipe(lr={"sgd": 0.05, "adam": 1e-3, "adamw": 1e-3}, batch_size=64, epochs=30, schedule="cosine")


def name_of(model: str, data: str, loss: str) -> str:
    """The name of the task of a network, splits and a loss."""
    name = f"{model} on {data} by {loss}"
    if not is_own(name):
        raise UsageError(f"model and data must name objects as pkg.mod:name, got {model!r} and {data!r}")
    return name


def is_own(name: object) -> bool:
    """Whether this is the name of a task of the user's own."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


@cache
def task(name: str) -> Task:
    """The task of this name. Raises UsageError where something that it names is not there."""
    match = _NAME.fullmatch(name)
    assert match is not None
    model, data, loss = match.groups()
    for part, option in ((model, "model"), (data, "data")):
        if not callable(resolve(part, option)):
            raise UsageError(f"{option} must name a function, got {part!r}")
    criterion = _criterion(loss)
    classifies = isinstance(criterion, nn.CrossEntropyLoss)
    return OwnTask(
        name=name,
        summary="a network and data of your own",
        network=model,
        data=data,
        model=partial(_network, model),
        load=partial(_splits, data, classifies),
        loss=criterion,
        metric="accuracy" if classifies else "loss",
        meter=Accuracy if classifies else None,
        classes=2 if classifies else None,
        recipe=_RECIPE,
        width=64,
        widths=(16, 64, 256),
        chunk=1024,
    )


@dataclass(frozen=True)
class OwnTask(Task):
    """A task whose classes are those of its data."""

    def classes_in(self, data: Splits) -> int | None:
        """As many classes as the largest label says."""
        if self.classes is None:
            return None
        return int(max(part.targets.max() for part in (data.train, data.validation, data.test))) + 1

    def parameters(self, width: int) -> int:
        """Number of parameters at this width."""
        return parameter_count(self.model(width))  # which need not work on the meta device


def _network(name: str, width: int, **_: Any) -> nn.Module:
    module = called(name, "model", width)
    if not isinstance(module, nn.Module):
        raise UsageError(
            f"model must name a function of the width that returns a torch.nn.Module, got {described(module)}"
        )
    return module.float()


def _splits(name: str, classifies: bool, source: str | None, seed: int) -> Splits:
    """The splits that a function returns: (train, test), or (train, validation, test), or a dictionary of those.

    Each is a pair of tensors (inputs, targets), or a data set of torch with such samples, which is put into memory. One
    without validation gives up a tenth of its training samples.
    """
    made = called(name, "data", *([seed] if _takes_a_seed(resolve(name, "data")) else []))
    names = ("train", "validation", "test")
    parts = dict(made) if isinstance(made, Mapping) else {}
    if isinstance(made, list | tuple) and len(made) in (2, 3):
        parts = dict(zip(names if len(made) == 3 else ("train", "test"), made, strict=True))
    if not {"train", "test"} <= parts.keys() <= set(names):
        raise UsageError(
            f"data must name a function that returns (train, test) or (train, validation, test), got {described(made)}"
        )
    data = {part: _in_memory(value, part, classifies) for part, value in parts.items()}
    if "validation" not in data:
        data["train"], data["validation"] = hold_out(data["train"])
    return Splits(data["train"], data["validation"], data["test"])


def _takes_a_seed(function: Callable[..., Any]) -> bool:
    return "seed" in inspect.signature(function).parameters


def _in_memory(part: Any, name: str, classifies: bool) -> TensorData:
    rule = f"the {name} split must be a pair of tensors (inputs, targets) or a data set of such samples"
    if not is_pair(part):
        try:
            samples = [part[i] for i in range(len(part))]
            part = tuple(
                torch.stack([torch.as_tensor(value) for value in column]) for column in zip(*samples, strict=True)
            )
        except Exception as error:  # of whatever it is
            raise UsageError(f"{rule}, got {described(part)} ({type(error).__name__}: {error})") from error
    if not (is_pair(part) and len(part[0]) == len(part[1])):
        raise UsageError(f"{rule}, got {described(part)}")
    inputs, targets = part
    if classifies and targets.is_floating_point():
        raise UsageError(f"{rule} of class numbers for loss cross_entropy, got targets as {targets.dtype}")
    targets = targets.long() if classifies else targets.float()
    return TensorData(inputs.float() if inputs.is_floating_point() else inputs, targets)


def _criterion(name: str) -> nn.Module:
    if name in LOSSES:
        return LOSSES[name]()
    named = resolve(name, "loss")
    named = named() if isinstance(named, type) else named
    if not callable(named):
        raise UsageError(f"loss must be cross_entropy, mse, or name a loss of (outputs, targets), got {name!r}")
    return named if isinstance(named, nn.Module) else _Function(named)


class _Function(nn.Module):
    """A function of (outputs, targets) that returns the mean over samples."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self._function = function

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._function(outputs, targets)

    def denominator(self, targets: Tensor) -> int:
        """Each sample counts."""
        return len(targets)
