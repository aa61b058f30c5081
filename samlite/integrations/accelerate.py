"""SAM under accelerate."""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from samlite.errors import UsageError
from samlite.optim.sam import SAM


def prepare(accelerator: Accelerator, *objects: Any) -> Any:
    """What ``accelerator.prepare(*objects)`` returns, with every `samlite.SAM` as `AcceleratedSAM`.

    ```python
    model, optimizer, loader = samlite.integrations.prepare(accelerator, model, optimizer, loader)

    def closure():
        loss = criterion(model(inputs), targets)
        accelerator.backward(loss)
        return loss

    loss = optimizer.step(closure)
    ```
    """
    prepared = accelerator.prepare(*objects)
    for optimizer in prepared if isinstance(prepared, tuple) else (prepared,):
        if isinstance(optimizer, AcceleratedOptimizer) and isinstance(optimizer.optimizer, SAM):
            optimizer.__class__ = AcceleratedSAM  # which accelerate goes on to know
            optimizer.optimizer.scaler = optimizer.scaler
    return prepared


class AcceleratedSAM(AcceleratedOptimizer):  # type: ignore[misc]
    """accelerate's optimizer around SAM: `step` takes a closure and returns its loss, and both halves are there.

    A scaler of mixed precision is SAM's. To accumulate gradients, pass a list of closures to `step`.
    """

    optimizer: SAM

    def step(self, closure: Any = None) -> torch.Tensor:
        """Run both passes, step, and return the loss of the first."""
        self._check_whole()
        skipped = self.optimizer.skipped
        loss = self.optimizer.step(closure)
        self._is_overflow = self.optimizer.skipped > skipped
        return loss

    def first_step(self, zero_grad: bool = False) -> None:
        """Perturb the weights by the gradients of a first pass."""
        self._check_whole()
        self.optimizer.first_step(zero_grad)

    def second_step(self, zero_grad: bool = False) -> None:
        """Restore the weights, and step with the gradients of a second pass."""
        self.optimizer.second_step(zero_grad)

    def _check_whole(self) -> None:
        if not self.gradient_state.sync_gradients or self.gradient_state.num_steps > 1:
            raise UsageError(
                "SAM needs whole batches at every step, got gradient_accumulation_steps="
                f"{self.gradient_state.num_steps}; leave it out, and pass optimizer.step a list of closures"
            )
