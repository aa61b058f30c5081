"""What a task is: its data, its network, its loss and metric, and the recipe that trains it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from samlite.curvature.criterion import denominator
from samlite.data.tensors import Batch, Batches, Splits, TensorData
from samlite.errors import UsageError
from samlite.models import parameter_count
from samlite.seeds import generator


class Meter(Protocol):
    """Gathers a metric over batches of outputs."""

    def update(self, outputs: Tensor, targets: Tensor) -> None: ...

    def compute(self) -> dict[str, float]: ...  # the task's metric first; others may follow


@dataclass(frozen=True)
class Recipe:
    """How a task is trained by default."""

    lr: Mapping[str, float]
    """The learning rate by base optimizer; their scales differ a hundredfold."""
    batch_size: int
    epochs: int
    momentum: float = 0.9
    weight_decay: float = 0.0
    dropout: float | None = None
    """The dropout rate; None where the network has no dropout."""
    rho: float = 0.05
    schedule: Literal["step", "cosine", "constant"] = "step"
    milestones: tuple[float, ...] = (0.5, 0.75)
    """The fractions of the epochs after which the step schedule divides lr by 10."""
    threads: int = 1
    """CPU threads. For small networks more gain nothing, and lose much on a busy machine."""
    settings: Mapping[str, float] = field(default_factory=dict)
    """Settings that only this task has, by name."""


@dataclass(frozen=True)
class Scores:
    """The loss and the metrics of a model on a split."""

    loss: float
    metric: float
    others: Mapping[str, float] = field(default_factory=dict)
    """Further metrics by name."""


@dataclass(frozen=True)
class Task:
    """A data set with the network, the loss and the recipe to train on it."""

    name: str
    summary: str
    network: str
    """What `model` builds, its hidden layers in terms of the width w."""
    data: str
    """Where the data come from, and how many there are."""
    model: Callable[..., nn.Module]
    """Builds the network of a width. Keywords: dropout if the recipe has it, and `Splits.sizes`."""
    load: Callable[[str | None, int], Splits]
    """Loads the data of a source for a seed, on the CPU."""
    loss: nn.Module
    """criterion(outputs, targets): the mean over what its `denominator` counts."""
    metric: str
    """The name of the metric: "loss", or one that `meter` computes."""
    recipe: Recipe
    width: int
    """The default width."""
    widths: tuple[int, ...]
    """The widths of a sweep worth running."""
    meter: Callable[[], Meter] | None = None
    """Makes the meter that gathers the metric; None where the metric is the loss."""
    extra: str | None = None
    """The extra of the package that `load` needs."""
    source: str | None = None
    """The default source; None where the task takes none."""
    base: str = "sgd"
    """The optimizer that SAM wraps and is compared with."""
    classes: int | None = None
    """The number of classes; None where the task is no classification. `classes_in` knows where the data decide."""
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None
    """Alters the inputs of a training batch, with random numbers drawn on the CPU."""
    chunk: int = 4096
    """How many samples are evaluated at once."""

    @property
    def higher_is_better(self) -> bool:
        return self.metric != "loss"

    @property
    def augments(self) -> bool:
        """Whether `batches` alters the inputs by default."""
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

    def draw(self, data: Any, count: int, seed: int) -> Any:
        """So many training samples, the same for every run of a seed. Raises UsageError where there are not as many."""
        if count > len(data):
            raise UsageError(f"train_samples must be <= {len(data):,}, the samples of the data, got {count:,}")
        return data[torch.randperm(len(data), generator=generator("training samples", seed))[:count]]

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
        metrics = meter.compute()
        return Scores(loss, metrics.pop(self.metric), metrics)

    def subsample(self, model: nn.Module, data: Any, count: int, seed: int) -> tuple[Any, int]:
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
class Classification(Task):
    """A task with one class a sample, of as many classes as its data need outputs."""

    def classes_in(self, data: Splits) -> int | None:
        """As many as there are outputs."""
        return data.sizes.get("outputs", self.classes)
