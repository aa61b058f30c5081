"""The optimizer of a run, and the closures that its steps take."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from samlite.config import Config
from samlite.losses import denominator, rows, samples
from samlite.sam import SAM, Closure
from samlite.tasks import Task
from samlite.tasks.task import Batch
from samlite.variants import AgnosticSAM, FriendlySAM, SAMPa

_BASES = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
_FAMILY = {"sam": SAM, "friendly": FriendlySAM, "agnostic": AgnosticSAM, "sampa": SAMPa}


def optimizer_of(model: nn.Module, config: Config, scaler: torch.amp.GradScaler | None) -> SAM:
    """Of the SAM family; one of the base optimizers is SAM with rho = 0, which is that optimizer bit for bit."""
    options: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.base == "sgd":
        options["momentum"] = config.momentum
    if config.m:
        options["m"] = 1  # closures; `Closures` makes one for each m samples
    kind = _FAMILY.get(config.optimizer, SAM)
    max_norm = config.clip or None
    return kind(
        model.parameters(), _BASES[config.base], config.rho, model=model, max_norm=max_norm, scaler=scaler, **options
    )


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
        gradients: int = 0,
    ) -> None:
        self.model, self.task, self.config, self.optimizer = model, task, config, optimizer
        self.held_out, self.gradients = held_out, gradients
        self._type = torch.device(config.device).type

    def steps(self, batches: Iterable[Batch]) -> Iterator[list[Any]]:
        """For each batch the arguments of the optimizer's step."""
        if self.config.optimizer == "sampa":
            yield from self._with_the_next(batches)
            return
        for batch in batches:
            second = [self.of(self.held_out())] if self.held_out else []
            yield [self.of(batch), *second]

    def of(self, batch: Batch) -> list[Closure]:
        """A closure for each micro-batch; the mean of their losses is that of the batch."""
        parts = self._parts(batch)
        whole = denominator(self.task.loss, batch[1]) if len(parts) > 1 else 1
        return [self._closure(part, len(parts), whole, first=i == 0) for i, part in enumerate(parts)]

    def _closure(self, batch: Batch, parts: int, whole: Any, first: bool) -> Closure:
        inputs, targets = batch

        def closure() -> Tensor:
            self.gradients += first
            with torch.autocast(self._type, self._dtype, enabled=self.config.precision != "float32"):
                loss: Tensor = self.task.loss(self.model(inputs), targets)
            if parts > 1:  # the optimizer takes the plain mean, and a part may have fewer samples, or labels
                loss = loss.nan_to_num() * (denominator(self.task.loss, targets) * parts / whole)
            scaler = self.optimizer.scaler
            (scaler.scale(loss) if scaler else loss).backward()  # type: ignore[no-untyped-call]
            return loss

        return closure

    def _parts(self, batch: Batch) -> list[Batch]:
        if not self.config.m and self.config.accumulate == 1:
            return [batch]
        count = samples(batch)
        size = self.config.m or -(-count // self.config.accumulate)
        return [rows(batch, slice(start, start + size)) for start in range(0, count, size)]

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
