"""What every data set promises, data sets that fit in memory, and their splits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from samlite.errors import UsageError

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
        """All samples once; see `Data.batches`."""
        if generator is None:
            yield from zip(torch.split(self.inputs, batch_size), torch.split(self.targets, batch_size), strict=True)
            return
        order = torch.randperm(len(self), generator=generator).to(self.inputs.device)
        for rows in torch.split(order, batch_size):
            yield self.inputs[rows], self.targets[rows]


@dataclass(frozen=True)
class Splits:
    """Training, validation and test data. Models are selected on validation, never on test."""

    train: Any
    """Each a `Data`."""
    validation: Any
    test: Any
    sizes: Mapping[str, int] = field(default_factory=dict)
    """What the network must fit: keywords of the task's model."""

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
class Batches:
    """The batches of a `Data`, the same at every pass."""

    data: Any
    size: int

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.data.batches(self.size))
