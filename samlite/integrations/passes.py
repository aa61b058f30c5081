"""The two passes of SAM in a trainer that runs forward and backward by itself, on one micro-batch after the other."""

from collections.abc import Callable
from typing import Any

from torch import nn

from samlite.optim.passes import buffers_of, put_back, random_state, replay
from samlite.optim.sam import SAM


class Passes:
    """Remembers the micro-batches of a step, and runs the second pass over them at the perturbed weights.

    Dropout is replayed, and only the first pass changes buffers such as batch-norm statistics.
    """

    def __init__(self, optimizer: SAM, model: nn.Module) -> None:
        self.optimizer, self.model = optimizer, model
        self._done: list[tuple[Callable[[], Any], Any]] = []  # what repeats each micro-batch, and its random state

    def begin(self, again: Callable[[], Any]) -> None:
        """A micro-batch follows, which `again` repeats: forward and backward."""
        self._done.append((again, self._random()))

    def repeat_last_by(self, again: Callable[[], Any]) -> None:
        """Repeat the last micro-batch by this."""
        self._done[-1] = again, self._done[-1][1]

    def end(self) -> None:
        """The gradients of all micro-batches are there: run the second pass, which leaves its own.

        The weights are put back by `second_step`.
        """
        done, self._done = self._done, []
        if not any(group["rho"] for group in self.optimizer.param_groups):
            return
        after, buffers = self._random(), buffers_of(self.model)
        self.optimizer.first_step(zero_grad=True)
        try:
            for again, state in done:
                replay(state)
                again()
        except BaseException:
            self.optimizer.restore()
            raise
        finally:
            put_back(buffers)
            replay(after)

    def _random(self) -> Any:
        return random_state({weight.device for group in self.optimizer.param_groups for weight in group["params"]})


class Stepping(SAM):
    """SAM whose `step` is the second half: the trainer has run both passes."""

    def step(self, closure: Any = None) -> Any:
        """Put the weights back where they are perturbed, and step with the gradients at hand."""
        if self._snapshot.taken:
            self.second_step()
        else:  # rho is 0
            self.base_optimizer.step()
        return None
