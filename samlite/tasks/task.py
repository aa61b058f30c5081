"""What a task is: its data, its network, its loss and metric, and the recipe that trains it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from samlite.curvature.function import denominator
from samlite.errors import UsageError
from samlite.models import parameter_count
from samlite.seeds import generator

Batch = tuple[Any, Tensor]  # inputs (a tensor, or a tuple of tensors) and targets, each with the samples first


class Data(Protocol):
    """Samples with their targets, from which batches are made."""

    @property
    def targets(self) -> Tensor: ...  # (n, ...): class numbers, negative where there is none; or numbers, nan likewise

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Tensor | slice) -> Data: ...

    def to(self, device: torch.device | str) -> Data: ...

    def batches(self, batch_size: int, generator: torch.Generator | None = None) -> Iterator[Batch]:
        """All samples once, the last batch possibly smaller; shuffled by the generator, else in a fixed order.

        The generator lives on the CPU, so that every device sees the same order.
        """
        ...


class Meter(Protocol):
    """Gathers a metric over batches of outputs."""

    def update(self, outputs: Tensor, targets: Tensor) -> None: ...

    def compute(self) -> dict[str, float]: ...  # the task's metric first; others may follow


@dataclass(frozen=True)
class TensorData:
    """A data set that fits in memory: inputs (n, ...) and targets (n, ...) on one device."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, rows: Tensor | slice) -> TensorData:
        return TensorData(self.inputs[rows], self.targets[rows])

    def to(self, device: torch.device | str) -> TensorData:
        return TensorData(self.inputs.to(device), self.targets.to(device))

    def batches(self, batch_size: int, generator: torch.Generator | None = None) -> Iterator[Batch]:
        """As of `Data`."""
        if generator is None:
            yield from zip(torch.split(self.inputs, batch_size), torch.split(self.targets, batch_size), strict=True)
            return
        order = torch.randperm(len(self), generator=generator).to(self.inputs.device)
        for rows in torch.split(order, batch_size):
            yield self.inputs[rows], self.targets[rows]


@dataclass(frozen=True)
class Splits:
    """Training, validation and test data. Models are selected on validation, never on test."""

    train: Any  # each a `Data`
    validation: Any
    test: Any
    sizes: Mapping[str, int] = field(default_factory=dict)  # what the network must fit: keywords of the task's model

    def __post_init__(self) -> None:
        for name in ("train", "validation", "test"):
            if not len(getattr(self, name)):
                raise UsageError(f"the {name} split must not be empty; use more data")

    def to(self, device: torch.device | str) -> Splits:
        return Splits(self.train.to(device), self.validation.to(device), self.test.to(device), self.sizes)


def hold_out(data: Any, fraction: float = 0.1, draw: torch.Generator | None = None) -> tuple[Any, Any]:
    """Split a `Data` in two at random, the second holding the fraction; always the same split without a generator."""
    order = torch.randperm(len(data), generator=draw or torch.Generator().manual_seed(0))
    held = round(fraction * len(data))
    return data[order[held:]], data[order[:held]]


@dataclass(frozen=True)
class Recipe:
    """How a task is trained unless the user says otherwise."""

    lr: Mapping[str, float]  # by base optimizer: their scales differ a hundredfold
    batch_size: int
    epochs: int
    momentum: float = 0.9
    weight_decay: float = 0.0
    dropout: float | None = None  # None: the network has none
    rho: float = 0.05
    schedule: Literal["step", "cosine", "constant"] = "step"
    milestones: tuple[float, ...] = (0.5, 0.75)  # fractions of the epochs after which step divides lr by 10
    threads: int = 1  # of the CPU: for small networks more gain nothing, and lose much on a busy machine
    settings: Mapping[str, float] = field(default_factory=dict)  # what only this task has


@dataclass(frozen=True)
class Scores:
    """How good a model is on a split."""

    loss: float
    metric: float
    others: Mapping[str, float] = field(default_factory=dict)  # further metrics by name


@dataclass(frozen=True)
class Task:
    """A data set with the network, the loss and the recipe to train on it."""

    name: str
    summary: str
    network: str  # what `model` builds: its hidden layers in terms of the width w
    data: str  # where the data come from, and how many there are
    model: Callable[..., nn.Module]  # width -> module; keywords: dropout if the recipe has it, `Splits.sizes`
    load: Callable[[str | None, int], Splits]  # source, seed -> data on the CPU
    loss: nn.Module  # criterion(outputs, targets), the mean over what its `denominator` counts
    metric: str  # "loss", or what `meter` gathers
    recipe: Recipe
    width: int  # the default
    widths: tuple[int, ...]  # a sweep worth running
    meter: Callable[[], Meter] | None = None  # None: the metric is the loss
    extra: str | None = None  # of the package, with what `load` needs
    source: str | None = None  # default of `load`; None: the task takes no source
    base: str = "sgd"  # the optimizer that SAM wraps and is compared with
    classes: int | None = None  # of a classification; `classes_in` where that depends on the data
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None  # inputs of a training batch; draws on the CPU
    chunk: int = 4096  # samples evaluated at once

    @property
    def higher_is_better(self) -> bool:
        return self.metric != "loss"

    @property
    def augments(self) -> bool:
        """Whether `batches` alters the inputs unless told not to."""
        return self.augment is not None

    @property
    def fixed_samples(self) -> bool:
        """Whether every epoch has the same training samples, which a network can fit without error."""
        return True

    def classes_in(self, data: Splits) -> int | None:
        """How many classes the labels have; None where the task is no classification."""
        return self.classes

    def rank(self, metric: float, loss: float) -> tuple[float, float]:
        """A key that grows with how good a model is: by its metric, then its loss where metrics tie."""
        return metric if self.higher_is_better else -metric, -loss

    def with_settings(self, settings: Mapping[str, float]) -> Task:
        """The task with these in place of its recipe's settings. Raises UsageError where one is out of range."""
        return replace(self, recipe=replace(self.recipe, settings=settings)) if settings else self

    def build(self, width: int, dropout: float | None, sizes: Mapping[str, int]) -> nn.Module:
        """The network, on the CPU."""
        return self.model(width, **sizes) if dropout is None else self.model(width, dropout=dropout, **sizes)

    def parameters(self, width: int) -> int:
        """Number of parameters at this width for the task's own data, counted without allocating them."""
        with torch.device("meta"):
            return parameter_count(self.model(width))

    def splits(self, source: str | None, seed: int) -> Splits:
        """The data of a run, on the CPU; a task with settings may apply them."""
        return self.load(source, seed)

    def batches(
        self, model: nn.Module, data: Any, batch_size: int, order: torch.Generator, augment: bool
    ) -> Iterator[Batch]:
        """An epoch of training batches."""
        for inputs, targets in data.batches(batch_size, order):
            yield (self.augment(inputs, order) if self.augment and augment else inputs), targets

    @torch.no_grad()
    def evaluate(self, model: nn.Module, data: Any) -> Scores:
        """Mean loss and metric over a `Data`, in evaluation mode."""
        model.eval()
        meter = self.meter() if self.meter else None
        losses, weights = [], []
        for inputs, targets in data.batches(self.chunk):
            outputs = model(inputs)
            weight = torch.as_tensor(denominator(self.loss, targets), dtype=torch.float64)
            losses.append(self.loss(outputs, targets).nan_to_num().double().cpu() * weight.cpu())
            weights.append(weight.cpu())
            if meter:
                meter.update(outputs, targets)
        loss = (torch.stack(losses).sum() / torch.stack(weights).sum()).item()
        if meter is None:
            return Scores(loss, loss)
        found = meter.compute()
        return Scores(loss, found.pop(self.metric), found)

    def measured(self, model: nn.Module, data: Any, count: int, seed: int) -> tuple[Any, int]:
        """What a Hessian is measured on: so many samples drawn by the seed, all if there are no more; and how many.

        An (inputs, targets) pair of tensors, or a re-iterable of batches.
        """
        if count < len(data):
            rows = torch.randperm(len(data), generator=generator("measured samples", seed))[:count].sort().values
            data = data[rows.to(data.targets.device)]
        if isinstance(data, TensorData):
            return (data.inputs, data.targets), len(data)
        return Batches(data, min(self.chunk, 256)), len(data)


@dataclass(frozen=True)
class Batches:
    """The batches of a `Data`, the same at every pass."""

    data: Any
    size: int

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.data.batches(self.size))


class Accuracy:
    """The fraction of targets whose class has the largest output; negative targets do not count.

    Outputs are (n, classes) or (n, positions, classes), targets (n) or (n, positions).
    """

    def __init__(self) -> None:
        self.correct: list[Tensor] = []
        self.counted: list[Tensor] = []

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.correct.append((outputs.argmax(-1) == targets).sum())
        self.counted.append((targets >= 0).sum())

    def compute(self) -> dict[str, float]:
        return {"accuracy": torch.stack(self.correct).sum().item() / torch.stack(self.counted).sum().item()}
