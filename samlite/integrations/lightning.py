"""SAM in Lightning's automatic optimization."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from samlite.errors import UsageError
from samlite.optim.passes import buffers_of, put_back, random_state, replay
from samlite.optim.sam import SAM


class SAMCallback(Callback):  # type: ignore[misc]
    """Puts SAM around the optimizers that a LightningModule configures, without a change to the module.

    ```python
    Trainer(callbacks=[samlite.integrations.SAMCallback(rho=0.05)]).fit(module, loader)
    ```

    Gradient clipping is of each gradient, and ``accumulate_grad_batches`` runs both passes over all batches of a step.
    Dropout is the same in both passes, batch-norm statistics and what is logged are of the first.

    Args:
        rho: radius, as of `samlite.SAM`; so are `adaptive` and `normalize`.

    Raises:
        UsageError: the module optimizes by hand (call `samlite.SAM` there), or gradients are scaled (16-mixed).
    """

    def __init__(self, rho: float = 0.05, adaptive: bool = False, normalize: bool = True) -> None:
        self._sam = {"rho": rho, "adaptive": adaptive, "normalize": normalize}
        self._batches: list[tuple[Any, int, Any]] = []  # of this step, with the random state before each

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wrap the optimizers."""
        if not pl_module.automatic_optimization:
            raise UsageError("SAMCallback needs automatic optimization; in manual optimization use samlite.SAM itself")
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise UsageError("SAMCallback needs unscaled gradients, got precision='16-mixed'; use 'bf16-mixed'")
        trainer.strategy.optimizers = [_InLightning(base, self, pl_module, **self._sam) for base in trainer.optimizers]
        for config in trainer.lr_scheduler_configs:
            inner = config.scheduler.optimizer
            config.scheduler.optimizer = next(sam for sam in trainer.optimizers if sam.base_optimizer is inner)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember the batch, and the random state before it."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._batches = []
        self._batches.append((batch, batch_idx, random_state({pl_module.device})))

    def again(self, module: LightningModule, closure: Any) -> None:
        """Run forward and backward once more over the batches of this step, unseen."""
        after, buffers = random_state({module.device}), buffers_of(module)
        trainer, earlier = module.trainer, self._batches[:-1]
        with _unlogged(module):
            for batch, index, state in earlier:
                replay(state)
                with trainer.precision_plugin.train_step_context(), torch.enable_grad():
                    outputs = module.training_step(batch, index)
                loss = outputs["loss"] if isinstance(outputs, dict) else outputs
                trainer.strategy.backward(loss / trainer.accumulate_grad_batches, None)
            replay(self._batches[-1][2])
            closure()
        put_back(buffers)
        replay(after)


class _InLightning(SAM):
    """SAM whose first pass may have begun in earlier batches: their gradients are there."""

    def __init__(self, base: Any, callback: SAMCallback, module: LightningModule, **options: Any) -> None:
        groups = [{"params": list(group["params"])} for group in base.param_groups]
        super().__init__(groups, base, **options)
        self._callback, self._module = callback, module

    def step(self, closure: Any = None) -> Any:
        """Run the closure, which ends the first pass; climb, run the second pass, and step."""
        with torch.enable_grad():
            loss = closure()
        if self._plain():
            self.base_optimizer.step()
            return loss
        self.first_step(zero_grad=True)
        try:
            with torch.enable_grad():
                self._callback.again(self._module, closure)
        except BaseException:
            self.restore()
            raise
        self.second_step()
        return loss


@contextmanager
def _unlogged(module: Any) -> Iterator[None]:
    """What the module logs inside does not count."""
    module.log = module.log_dict = lambda *_, **__: None
    try:
        yield
    finally:
        del module.log, module.log_dict
