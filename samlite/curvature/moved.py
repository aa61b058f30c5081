"""A loss at other weights than the model's, which is left as it was: its weights, their versions, and kept graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from samlite.curvature.function import Losses
from samlite.curvature.stream import End
from samlite.distributed import Ranks


class Moved:
    """The mean loss, its gradient and other means over a data set at w + step.

    Args:
        losses: the data set; a cut of its own is used.
        ranks: the processes, where each has a part of the data.
        around: the conditions in which the loss is evaluated.

    In memory: one copy of the weights, and the graph of one batch.
    """

    def __init__(
        self,
        losses: Losses,
        ranks: Ranks | None = None,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.losses, self._ranks, self._around = losses, ranks, around

    def loss(self, step: Tensor | None = None) -> float:
        """The mean loss at w + step: (p,)."""
        return self.mean(lambda batch: self.losses.total(batch), step)

    def mean(self, measure: Callable[[Any], tuple[Tensor, float]], step: Tensor | None = None) -> float:
        """The sum over all batches of what `measure` gives first, over the sum of what it gives second."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.losses.parameters[0].device)
        with self._around(), self.at(step), torch.no_grad():
            self.losses.rewind(0)
            while (batch := self.losses.next_batch()) is not End:
                total, weight = measure(batch)
                sums += torch.stack([total.detach().double(), torch.full_like(sums[0], weight)])
        if self._ranks:
            self._ranks.sum(sums)
        return float(sums[0] / sums[1])

    def gradient(self, step: Tensor | None = None) -> Tensor:
        """The gradient of the mean loss at w + step: (p,)."""
        with self._around(), self.at(step):
            sums, weight = self.losses.gradient()
        if self._ranks:
            self._ranks.sum(sums)
            weight = self._ranks.total(weight)
        return sums / weight

    @contextmanager
    def at(self, step: Tensor | None) -> Iterator[None]:
        """The weights w + step inside. They stand in other memory, so that graphs of w stay valid."""
        if step is None:
            yield
            return
        params = self.losses.parameters
        own = [p.data for p in params]
        parts = torch.split(step, [p.numel() for p in params])
        try:
            for p, part in zip(params, parts, strict=True):
                p.data = p.data + part.view(p.shape).to(p)
            yield
        finally:
            for p, data in zip(params, own, strict=True):
                p.data = data
