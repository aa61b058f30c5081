"""What a task is: its data, its network, its loss and metric, and the recipe that trains it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from samlite.models import parameter_count


@dataclass(frozen=True)
class TensorData:
    """A data set that fits in memory: inputs (n, ...) and targets (n, ...) on one device."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, rows: Tensor | slice) -> "TensorData":
        return TensorData(self.inputs[rows], self.targets[rows])

    def to(self, device: torch.device | str) -> "TensorData":
        return TensorData(self.inputs.to(device), self.targets.to(device))

    def batches(self, batch_size: int, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """All samples once, the last batch possibly smaller; shuffled by the generator, else in order.

        The generator lives on the CPU, so that every device sees the same order.
        """
        if generator is None:
            yield from zip(torch.split(self.inputs, batch_size), torch.split(self.targets, batch_size), strict=True)
            return
        order = torch.randperm(len(self), generator=generator).to(self.inputs.device)
        for rows in torch.split(order, batch_size):
            yield self.inputs[rows], self.targets[rows]


@dataclass(frozen=True)
class Splits:
    """Training, validation and test data. Models are selected on validation, never on test."""

    train: TensorData
    validation: TensorData
    test: TensorData

    def __post_init__(self) -> None:
        for name in ("train", "validation", "test"):
            if not len(getattr(self, name)):
                raise ValueError(f"the {name} split must not be empty; use more data")

    def to(self, device: torch.device | str) -> "Splits":
        return Splits(self.train.to(device), self.validation.to(device), self.test.to(device))


def hold_out(data: TensorData, fraction: float = 0.1) -> tuple[TensorData, TensorData]:
    """Split the data in two at random, the second holding the fraction. Always the same split."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
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
    rho: float = 0.05
    schedule: Literal["step", "cosine", "constant"] = "step"
    milestones: tuple[float, ...] = (0.5, 0.75)  # fractions of the epochs after which step divides lr by 10
    threads: int = 1  # of the CPU: for small networks more gain nothing, and lose much on a busy machine


@dataclass(frozen=True)
class Task:
    """A data set with the network, the loss and the recipe to train on it."""

    name: str
    summary: str
    network: str  # what `model` builds: its hidden layers in terms of the width w
    data: str  # where the data come from, and how many there are
    model: Callable[[int], nn.Module]  # width -> module
    load: Callable[[str | None, int], Splits]  # source, seed -> data on the CPU
    loss: nn.Module  # criterion(outputs, targets), the mean over the batch
    metric: Literal["accuracy", "loss"]
    recipe: Recipe
    width: int  # the default
    widths: tuple[int, ...]  # a sweep worth running
    source: str | None = None  # default of `load`; None: the task takes no source

    @property
    def higher_is_better(self) -> bool:
        return self.metric != "loss"

    def rank(self, metric: float, loss: float) -> tuple[float, float]:
        """A key that grows with how good a model is: by its metric, then its loss where metrics tie."""
        return metric if self.higher_is_better else -metric, -loss

    def parameters(self, width: int) -> int:
        """Number of parameters at this width, counted without allocating them."""
        with torch.device("meta"):
            return parameter_count(self.model(width))
