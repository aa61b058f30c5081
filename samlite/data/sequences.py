"""Sequences of unequal length as a data set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from samlite.data.tensors import Batch

LONGEST = 1_000  # positions of a sequence: a batch takes time and memory with the square of its longest
JITTER = 0.2  # of a length, before sequences of similar length are put together: batches differ from epoch to epoch


@dataclass(frozen=True)
class Sequences:
    """Padded sequences that fit in memory.

    inputs (n, T, ...) are whole numbers, 0 behind a sequence's end and > 0 somewhere at each of its positions.
    targets are (n), one a sequence, or (n, T), one a position.
    """

    inputs: Tensor
    targets: Tensor

    @property
    def lengths(self) -> Tensor:
        """Positions of each sequence (n)."""
        return (self.inputs.flatten(2) if self.inputs.dim() > 2 else self.inputs[..., None]).any(-1).sum(1)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, rows: Tensor | slice) -> Sequences:
        return Sequences(self.inputs[rows], self.targets[rows])

    def to(self, device: torch.device | str) -> Sequences:
        return Sequences(self.inputs.to(device), self.targets.to(device))

    def batches(self, batch_size: int, generator: torch.Generator | None = None) -> Iterator[Batch]:
        """All sequences once, each batch cut to its longest; without a generator from the shortest to the longest.

        Shuffled batches hold sequences of similar length, except a last one that is smaller: it is drawn from all.
        """
        lengths = self.lengths.cpu()
        if generator is None:
            batches = list(torch.split(lengths.sort(stable=True).indices, batch_size))
        else:
            batches = _similar(lengths, batch_size, generator)
        for rows in batches:
            there, longest = rows.to(self.inputs.device), int(lengths[rows].max())
            targets = self.targets[there]
            yield self.inputs[there, :longest], targets[:, :longest] if targets.dim() > 1 else targets


def _similar(lengths: Tensor, batch_size: int, generator: torch.Generator) -> list[Tensor]:
    order = torch.randperm(len(lengths), generator=generator)
    whole = len(order) - len(order) % batch_size
    sizes = lengths[order[:whole]] * (1 + JITTER * torch.rand(whole, generator=generator))
    batches = order[:whole][sizes.argsort()].view(-1, batch_size)
    shuffled = batches[torch.randperm(len(batches), generator=generator)]
    return [*shuffled, *([order[whole:]] if whole < len(order) else [])]


def pad(sequences: Sequence[Tensor], value: int = 0) -> Tensor:
    """Sequences (length, ...) as one tensor (n, T, ...), the value behind their ends."""
    return torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True, padding_value=value)


def hide(words: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """A part of the words at random becomes word 1, the unknown one; padding stays."""
    chosen = (torch.rand(words.shape, generator=generator) < rate).to(words.device)
    return words.where(~chosen | (words == 0), 1)
