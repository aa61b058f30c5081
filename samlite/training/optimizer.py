"""The optimizer of a run, and the closures that its steps take."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from samlite import distributed
from samlite.batches import rows, samples
from samlite.curvature.criterion import denominator
from samlite.data.tensors import Batch
from samlite.errors import UsageError
from samlite.optim.sam import SAM, Closure
from samlite.optim.sampa import SAMPa
from samlite.optim.variants import AgnosticSAM, FriendlySAM
from samlite.tasks import Task
from samlite.training.config import Config
from samlite.training.options import OPTIONS

_BASES = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
_FAMILY = {"sam": SAM, "friendly": FriendlySAM, "agnostic": AgnosticSAM, "sampa": SAMPa}


def parallel(model: nn.Module, config: Config) -> nn.Module:
    """The model for the forward pass in training: gradients are averaged over the processes that share batches."""
    if distributed.world() == 1 or config.split == "gradients":
        return model
    if config.sync_batch_norm:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    return DistributedDataParallel(model)


def optimizer_of(
    model: nn.Module, config: Config, scaler: torch.amp.GradScaler | None, forward: nn.Module | None = None
) -> SAM:
    """Of the SAM family; one of the base optimizers is SAM with rho = 0, which is that optimizer bit for bit."""
    options: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.base == "sgd":
        options["momentum"] = config.momentum
    if config.m:
        options["m"] = 1  # closures; `Closures` makes one for each m samples
    if config.perturb == "local" and isinstance(forward, DistributedDataParallel):
        options["no_sync"] = forward.no_sync
    options |= {name: getattr(config, name) for name, row in OPTIONS.items() if config.optimizer in row.usual}
    options |= {"adaptive": config.adaptive != "none", "normalize": config.normalize}
    if config.split == "gradients" and distributed.world() > 1:
        if distributed.world() != 2:
            raise UsageError(
                f"split gradients must go with two processes, got {distributed.world()}; use --nproc-per-node 2"
            )
        options["process_group"] = dist.group.WORLD
    options |= {"model": model, "max_norm": config.clip or None, "scaler": scaler}
    groups: Any = _weights_and_rest(model) if config.adaptive == "weights" else model.parameters()
    return _FAMILY.get(config.optimizer, SAM)(groups, _BASES[config.base], config.rho, **options)


def _weights_and_rest(model: nn.Module) -> list[dict[str, Any]]:
    """Biases, and the scales and shifts of normalisation, are vectors that ASAM may leave unscaled."""
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = [], []
    for name, parameter in model.named_parameters():
        masked = "parametrizations" in name  # weights kept as the vector of those that are not masked
        groups[parameter.ndim <= 1 and not masked].append(parameter)
    return [{"params": groups[0]}, {"params": groups[1], "adaptive": False}]


def scaler_of(config: Config) -> torch.amp.GradScaler | None:
    """Of a run in float16, whose gradients underflow without."""
    return torch.amp.GradScaler(torch.device(config.device).type) if config.precision == "float16" else None


class Closures:
    """Makes the closures of each step, and counts the gradients that they compute.

    Args:
        held_out: gives a batch for AgnosticSAM, drawn anew at every call.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        config: Config,
        optimizer: SAM,
        held_out: Callable[[], Batch] | None,
    ) -> None:
        self.model, self.task, self.config, self.optimizer = model, task, config, optimizer
        self.held_out, self._gradients = held_out, 0
        self._share, self._shares = (distributed.rank(), distributed.world()) if config.split == "batches" else (0, 1)
        self._type = torch.device(config.device).type

    def total(self) -> int:
        """How many gradients of a batch have been computed, by all processes together."""
        return self._gradients if self.config.split == "batches" else sum(distributed.all_gather(self._gradients))

    def count(self, gradients: int) -> None:
        """Take in gradients that were computed elsewhere."""
        self._gradients += gradients

    def steps(self, batches: Iterable[Batch]) -> Iterator[list[Any]]:
        """For each batch the arguments of the optimizer's step."""
        if self.config.optimizer == "sampa":
            yield from self._with_the_next(batches)
            return
        for batch in batches:
            second = [self.of(self.held_out())] if self.held_out else []
            yield [self.of(batch), *second]

    def of(self, batch: Batch) -> list[Closure]:
        """A closure for each micro-batch of this process; over all processes their mean loss is the batch's."""
        parts = self._parts(batch)
        count = len(parts) * self._shares
        whole = denominator(self.task.loss, batch[1]) if count > 1 else 1
        last = len(parts) - 1
        return [self._closure(part, count, whole, i == 0, i == last) for i, part in enumerate(parts)]

    def _closure(self, batch: Batch, parts: int, whole: Any, first: bool, last: bool) -> Closure:
        """Of one of so many parts of a batch with this denominator."""
        inputs, targets = batch
        waits = not last and not self.config.m  # for the others of the batch: gradients are averaged once

        def closure() -> Tensor:
            self._gradients += first
            with (
                self.model.no_sync() if waits and isinstance(self.model, DistributedDataParallel) else nullcontext(),
                torch.autocast(self._type, self._dtype, enabled=self.config.precision != "float32"),
            ):
                loss: Tensor = self.task.loss(self.model(inputs), targets)
            if parts > 1:  # the optimizer takes the plain mean, and a part may have fewer samples, or labels
                share = torch.as_tensor(denominator(self.task.loss, targets), dtype=loss.dtype, device=loss.device)
                loss = loss.nan_to_num() * (share * parts / whole)
            scaler = self.optimizer.scaler
            (scaler.scale(loss) if scaler else loss).backward()  # type: ignore[no-untyped-call]
            return loss

        return closure

    def _parts(self, batch: Batch) -> list[Batch]:
        """The micro-batches of this process: as many on every process, the last ones perhaps empty."""
        if not self.config.m and self.config.accumulate == self._shares == 1:
            return [batch]
        share = -(-samples(batch) // self._shares)
        batch = rows(batch, slice(self._share * share, (self._share + 1) * share))
        size = self.config.m or -(-share // self.config.accumulate)
        return [rows(batch, slice(start, start + size)) for start in range(0, share, size)]

    def _with_the_next(self, batches: Iterable[Batch]) -> Iterator[list[Any]]:
        last = None
        for batch in batches:
            if last is not None:
                yield [self.of(last), self.of(batch)]
            last = batch
        if last is not None:
            yield [self.of(last)]

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float16 if self.config.precision == "float16" else torch.bfloat16
