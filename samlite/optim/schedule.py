"""A schedule of the radius."""

from collections.abc import Callable, Sequence
from typing import Any

from torch.optim.optimizer import Optimizer


class RhoScheduler:
    """Multiplies the rho that each group had at first by a function of the number of steps, as LambdaLR does the lr.

    ```python
    schedule = samlite.RhoScheduler(optimizer, lambda step: min(1, step / 1000))  # a warm-up
    optimizer.step(closure)
    schedule.step()
    ```

    Where the function is 0, steps are those of the base optimizer, at its price.

    Args:
        factor: of the steps so far, 0 at first; or one function a group.

    Raises:
        ValueError: the groups have no rho, or there are not as many functions as groups.
    """

    def __init__(self, optimizer: Optimizer, factor: Callable[[int], float] | Sequence[Callable[[int], float]]) -> None:
        groups = optimizer.param_groups
        if not all("rho" in group for group in groups):
            raise ValueError(f"optimizer must have groups with a rho, got {type(optimizer).__name__}; use samlite.SAM")
        factors = [factor] * len(groups) if callable(factor) else list(factor)
        if len(factors) != len(groups):
            raise ValueError(f"factor must be a function, or one of each of {len(groups)} groups, got {len(factors)}")
        self.optimizer, self._factors, self._steps = optimizer, factors, 0
        for group in groups:
            group.setdefault("initial_rho", group["rho"])
        self._set()

    def step(self) -> None:
        """Go on by one step."""
        self._steps += 1
        self._set()

    def get_last_rho(self) -> list[float]:
        """The rho of each group."""
        return [float(group["rho"]) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """The number of steps; the functions are not in it."""
        return {"steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a number of steps."""
        self._steps = state_dict["steps"]
        self._set()

    def _set(self) -> None:
        for group, factor in zip(self.optimizer.param_groups, self._factors, strict=True):
            group["rho"] = float(group["initial_rho"]) * float(factor(self._steps))
