"""Processes that share a data set: sums over them, by torch.distributed."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """The processes of a group, whose tensors live on this device."""

    def __init__(self, group: Any, device: torch.device) -> None:
        if not dist.is_initialized():
            raise ValueError("process_group must go with an initialised torch.distributed; call init_process_group")
        self.group, self.device = group, device

    def sum(self, part: Tensor) -> None:
        """The sum over all processes, in place, the same bits on each."""
        dist.all_reduce(part, group=self.group)

    def total(self, part: float) -> float:
        """The sum of a number."""
        return self._reduced(part, dist.ReduceOp.SUM)

    def least(self, part: float) -> float:
        """The smallest of a number."""
        return self._reduced(part, dist.ReduceOp.MIN)

    def _reduced(self, part: float, operation: Any) -> float:
        number = torch.tensor([part], dtype=torch.float64, device=self.device)
        dist.all_reduce(number, operation, group=self.group)
        return number.item()
