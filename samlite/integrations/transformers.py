"""SAM in the Trainer of Hugging Face."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Trainer

from samlite.errors import UsageError
from samlite.integrations.passes import Passes, Stepping


class SAMTrainer(Trainer):  # type: ignore[misc]
    """Hugging Face's Trainer with SAM around the optimizer that its arguments ask for.

    ```python
    trainer = samlite.integrations.SAMTrainer(model, TrainingArguments("out"), train_dataset=data, rho=0.05)
    trainer.train()
    ```

    Learning rate, betas, weight decay, `optim` and schedulers are those of `TrainingArguments`; so are clipping, which
    is of the final gradient, bf16, checkpoints and resuming. With `gradient_accumulation_steps` both passes run over
    all micro-batches of a step. Dropout is the same in both, and batch-norm statistics are of the first. The loss that
    is logged is the one at the unperturbed weights.

    Args:
        rho: radius, as of `samlite.SAM`; so are `adaptive` and `normalize`.

    Raises:
        UsageError: with fp16, whose gradients are scaled; use bf16.
    """

    def __init__(
        self, *args: Any, rho: float = 0.05, adaptive: bool = False, normalize: bool = True, **kwargs: Any
    ) -> None:
        self._sam: dict[str, Any] = {"rho": rho, "adaptive": adaptive, "normalize": normalize}
        self._passes: Passes | None = None
        super().__init__(*args, **kwargs)
        if self.args.fp16:
            raise UsageError("SAMTrainer needs unscaled gradients, got fp16=True; use bf16=True")

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer that the arguments ask for, in SAM."""
        sam: Any = super().create_optimizer(model)
        if not isinstance(sam, Stepping):
            sam = Stepping([{"params": group["params"]} for group in sam.param_groups], sam, **self._sam)
        self.optimizer, self._passes = sam, Passes(sam, self.model)
        return sam  # type: ignore[no-any-return]

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Run forward and backward; behind the last micro-batch of a step, run the second pass over all of them."""
        assert self._passes is not None
        step = super().training_step
        self._passes.begin(lambda: step(model, inputs, num_items_in_batch))
        loss: torch.Tensor = step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            with self._unseen():
                self._passes.end()
        return loss

    @contextmanager
    def _unseen(self) -> Iterator[None]:
        """What the second pass counts, such as tokens, does not count."""
        before = {name: getattr(self.state, name) for name in ("num_input_tokens_seen", "total_flos")}
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(self.state, name, value)
