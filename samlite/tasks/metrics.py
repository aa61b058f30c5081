"""Metrics, each gathered over batches of outputs and targets."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def percent(metric: str) -> int:
    """The factor by which people read a metric: 100 for a fraction, which they read in percent, else 1."""
    return 100 if metric in ("accuracy", "average_precision", "roc_auc") else 1


def spelled(metric: str) -> str:
    """A metric's name with its unit, as a heading: accuracy %."""
    return metric.replace("_", " ") + (" %" if percent(metric) == 100 else "")


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
        from sklearn.metrics import average_precision_score, roc_auc_score

        scores = []
        for outputs, targets in zip(torch.cat(self.outputs).T, torch.cat(self.targets).T, strict=True):
            known = ~targets.isnan()
            ranked, positive = outputs[known].numpy(), targets[known].numpy() > 0.5
            if positive.any() and not positive.all():
                scores.append((average_precision_score(positive, ranked), roc_auc_score(positive, ranked)))
        means = torch.tensor(scores, dtype=torch.float64).mean(0).tolist() if scores else [math.nan, math.nan]
        return dict(zip(("average_precision", "roc_auc"), means, strict=True))
