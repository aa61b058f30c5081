"""Metrics, each gathered over batches of outputs and targets."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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


class Ranking:
    """Gathers outputs and labels (n, labels), nan where missing, and scores each label on its own.

    As the Open Graph Benchmark does for ogbg-molpcba: the mean over the labels with at least one positive and one
    negative sample. nan where there is no such label.
    """

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []
        self.targets: list[Tensor] = []

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.outputs.append(outputs.detach().cpu())
        self.targets.append(targets.cpu())

    def compute(self) -> dict[str, float]:
        scores = []
        for outputs, targets in zip(torch.cat(self.outputs).T, torch.cat(self.targets).T, strict=True):
            known = ~targets.isnan()
            outputs, positive = outputs[known], targets[known] > 0.5
            if positive.any() and not positive.all():
                curve = _curve(outputs, positive)
                scores.append((_average_precision(*curve), _roc_auc(*curve)))
        means = torch.tensor(scores, dtype=torch.float64).mean(0).tolist() if scores else [math.nan, math.nan]
        return dict(zip(("average_precision", "roc_auc"), means, strict=True))


def _curve(outputs: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """How many positive and how many negative samples reach each threshold; thresholds are the outputs, from above."""
    outputs, order = outputs.sort(descending=True)
    last_of_ties = torch.cat([outputs[1:] != outputs[:-1], torch.ones(1, dtype=torch.bool)])
    hits = positive[order].cumsum(0)[last_of_ties].double()
    return hits, last_of_ties.nonzero()[:, 0] + 1 - hits


def average_precision(outputs: Tensor, positive: Tensor) -> float:
    """The precision at each threshold, weighted by the recall that is gained there; outputs and labels (n)."""
    return _average_precision(*_curve(outputs, positive))


def roc_auc(outputs: Tensor, positive: Tensor) -> float:
    """The probability that a positive sample has the larger output of a random pair, ties counted half."""
    return _roc_auc(*_curve(outputs, positive))


def _average_precision(hits: Tensor, misses: Tensor) -> float:
    gained = torch.cat([hits[:1], hits.diff()]) / hits[-1]
    return (gained * hits / (hits + misses)).sum().item()


def _roc_auc(hits: Tensor, misses: Tensor) -> float:
    area = torch.trapezoid(torch.cat([hits.new_zeros(1), hits]), torch.cat([misses.new_zeros(1), misses]))
    return (area / (hits[-1] * misses[-1])).item()
