"""SAM in Lightning's automatic optimization."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from samlite.errors import UsageError
from samlite.integrations.passes import Passes, Stepping


class SAMCallback(Callback):  # type: ignore[misc]
    """Puts SAM around the optimizer that a LightningModule configures, without a change to the module.

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
        self._sam: dict[str, Any] = {"rho": rho, "adaptive": adaptive, "normalize": normalize}
        self._passes: Passes | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wrap the optimizer, of which automatic optimization has one."""
        if not pl_module.automatic_optimization:
            raise UsageError("SAMCallback needs automatic optimization; in manual optimization use samlite.SAM itself")
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise UsageError("SAMCallback needs unscaled gradients, got precision='16-mixed'; use 'bf16-mixed'")
        (base,) = trainer.optimizers
        optimizer = _InLightning([{"params": group["params"]} for group in base.param_groups], base, **self._sam)
        self._passes = optimizer.passes = Passes(optimizer, pl_module)
        trainer.strategy.optimizers = [optimizer]
        for config in trainer.lr_scheduler_configs:
            config.scheduler.optimizer = optimizer

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember the batch, and the random state before it."""

        def again() -> None:
            with trainer.precision_plugin.train_step_context():
                outputs = pl_module.training_step(batch, batch_idx)
            loss = outputs["loss"] if isinstance(outputs, dict) else outputs
            trainer.strategy.backward(loss / trainer.accumulate_grad_batches, None)

        assert self._passes is not None
        self._passes.begin(again)


class _InLightning(Stepping):
    """SAM whose first pass began in earlier batches: their gradients are there, and the closure runs the last one."""

    passes: Passes

    def step(self, closure: Any = None) -> Any:
        """Run the closure, which ends the first pass, and the second pass, and step."""
        loss = closure()
        self.passes.repeat_last_by(closure)  # which also clips
        with _unlogged(self.passes.model):
            self.passes.end()
        super().step()
        return loss


@contextmanager
def _unlogged(module: Any) -> Iterator[None]:
    """What the module logs inside does not count."""
    module.log = module.log_dict = lambda *_, **__: None
    try:
        yield
    finally:
        del module.log, module.log_dict
