"""Processes that share a data set, by torch.distributed: their sums, their parts of it, and how the terminal joins.

``torchrun --nproc-per-node N -m samlite.cli ...`` starts N processes, which find each other by what it puts into the
environment.
"""

import gc
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from samlite.batches import is_pair
from samlite.errors import UsageError

T = TypeVar("T")


class Ranks:
    """The processes of a group, whose tensors live on this device."""

    def __init__(self, group: Any, device: torch.device) -> None:
        if not dist.is_initialized():
            raise UsageError("process_group must go with an initialised torch.distributed; call init_process_group")
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


@contextmanager
def joined() -> Iterator[None]:
    """Join the other processes that a launcher started, if it did, and leave them afterwards."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    store, rank, size = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    # A launcher that restarts its processes gives them the same store, in which the addresses of the dead still are.
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"restart {restart}", store)  # type: ignore[attr-defined]
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        yield
    finally:
        gc.collect()  # a Hessian in a cycle would keep the group, whose threads must end before the interpreter does
        dist.destroy_process_group()


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this one, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def broadcast(compute: Callable[[], T]) -> T:
    """Compute on the first process and return its result on every one. Plain values only."""
    if world() == 1:
        return compute()
    box: list[Any] = [compute() if rank() == 0 else None]
    dist.broadcast_object_list(box)
    result: T = box[0]
    return result


def barrier() -> None:
    """Wait for the other processes."""
    if world() > 1:
        dist.barrier()


def all_gather(here: T) -> list[T]:
    """What every process gives, by rank. Plain values only."""
    values: list[Any] = [here] * world()
    if world() > 1:
        dist.all_gather_object(values, here)
    return values


def own_part(data: Any) -> Any:
    """This process's part of an (inputs, targets) pair or of a re-iterable of batches: every world-th."""
    if world() == 1:
        return data
    if is_pair(data):
        inputs, targets = data
        if len(inputs) < world():
            raise UsageError(f"data must hold a sample for each of {world()} processes, got {len(inputs)}")
        return inputs[rank() :: world()], targets[rank() :: world()]
    return _Part(data, rank(), world())


@dataclass(frozen=True)
class _Part:
    batches: Iterable[Any]
    first: int
    every: int

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.batches), self.first, None, self.every)
