"""What a measurement needs of a symmetric matrix: its products, and the price of one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

Progress = Callable[[int, float], None]
"""Called with (products so far, worst error over what is allowed)."""


class Matrix:
    """A symmetric matrix by its products with vectors of parameters."""

    names: list[str]
    """The names of the parameters."""
    params: list[nn.Parameter]
    """The parameters by which it is measured, whose dtype and device its vectors have."""
    memory: int
    """The bytes that the basis of a solver may take."""

    @property
    def shape(self) -> tuple[int, int]:
        """(p, p), p the number of parameters measured; tied ones count once."""
        p = sum(param.numel() for param in self.params)
        return p, p

    def products(self) -> AbstractContextManager[Any]:
        """The compiled operator, for use within."""
        raise NotImplementedError

    def precision(self) -> float:
        """The relative error of a product where that is more than rounding, else 0."""
        return 0.0

    def product_errors(self, vectors: Tensor) -> list[float]:
        """How far the product of each row is from the truth, where that is more than rounding."""
        return [0.0] * len(vectors)

    def gradient_seconds(self) -> float:
        """Seconds of a gradient of the loss: the unit of work."""
        raise NotImplementedError

    def room(self) -> int:
        """How many vectors the memory holds."""
        return self.memory // (self.shape[0] * self.params[0].element_size())

    def work(self, seconds: float) -> dict[str, float]:
        """The fields that every result ends with."""
        return {"gradient_evaluations": seconds / max(self.gradient_seconds(), 1e-9), "seconds": seconds}
