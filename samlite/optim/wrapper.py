"""An optimizer around a base optimizer, whose state and groups are its own, for schedulers and checkpoints."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from samlite.optim.perturbation import Snapshot, shards_of

OPTIONS = ("rho", "adaptive", "normalize")  # of a group, beside those of the base optimizer
# What wrappers keep in the state of a weight: samlite's own, and those of other implementations of SAM.
_REMEMBERED = {"mean_gradient", "ahead", "old_p", "e_w", "old_g"}


class Wrapper(Optimizer):
    """One state and one list of groups, which are the base optimizer's, however they are replaced or loaded."""

    base_optimizer: Optimizer
    # In a pickle, beside the optimizer's own:
    _kept: tuple[str, ...] = ("base_optimizer",)
    _remembers: tuple[str, ...] = ()  # names of what a variant keeps in the state of a weight
    _snapshot: Snapshot
    _completed_groups: list[dict[str, Any]] | None = None  # those seen to have a rho, adaptive and normalize

    def _weights(self) -> list[Any]:
        return [weight for group in self.param_groups for weight in group["params"]]

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The state of the base optimizer."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        self.base_optimizer.state = state

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the base optimizer, each with a rho, adaptive and normalize."""
        groups = self.base_optimizer.param_groups
        if groups is not self._completed_groups:
            for group in groups:
                for name in OPTIONS:
                    group.setdefault(name, self.defaults[name])
            self._completed_groups = groups
        return groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as on any optimizer; it may set its own rho, adaptive and normalize."""
        for name in OPTIONS:
            param_group.setdefault(name, self.defaults[name])
        rho = param_group["rho"]
        if isinstance(rho, Tensor) and rho.numel() == 1:
            rho = param_group["rho"] = rho.item()
        if not (isinstance(rho, (int, float)) and 0 <= rho < math.inf):
            raise ValueError(f"rho must be >= 0 and finite, got {rho!r}; use rho=0 for the base optimizer")
        self.base_optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the base optimizer with its groups, as on any optimizer."""
        self._check_restored("state_dict was called")
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state_dict: dict[str, Any] = self.base_optimizer.state_dict()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer, or of the base optimizer alone; what that lacks stays as it is."""
        self._check_restored("load_state_dict was called")
        state_dict = {**state_dict}  # hooks may change it
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        self.base_optimizer.load_state_dict(state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _watch_loading(self) -> None:
        """Pass every checkpoint that the base optimizer loads through `_completed`."""
        self.base_optimizer.register_load_state_dict_pre_hook(partial(_completed, remembers=self._remembers))

    def _check_restored(self, event: str) -> None:
        if self._snapshot.taken:
            raise RuntimeError(f"{event} between first_step and second_step; call second_step before it")

    @contextmanager
    def _out_of_sight(self) -> Iterator[None]:
        """Hide what a variant remembers: Adam and others take a state that is not empty for their own."""
        kept = {name: self._take(name) for name in self._remembers}
        try:
            yield
        finally:
            for name, values in kept.items():
                self._remember(name, values)

    def _take(self, name: str) -> dict[Tensor, Tensor]:
        """Take what is remembered of each weight by this name out of the state."""
        return {
            weight: self.state[weight].pop(name) for weight in self._weights() if name in self.state.get(weight, ())
        }

    def _remember(self, name: str, values: dict[Tensor, Tensor]) -> None:
        """Keep a tensor of each weight in the state, where checkpoints find it."""
        for weight, value in values.items():
            self.state[weight][name] = value

    def _only_makes_state(self, closure: Any) -> bool:
        """Whether this is the step by which torch.distributed.checkpoint makes a state: no closure, and all is 0."""
        if closure is not None or self.state or any(group.get("lr", 0) != 0 for group in self.param_groups):
            return False
        grads = [weight.grad for weight in self._weights() if weight.requires_grad]
        return all(grad is not None for grad in grads) and not any(grad.any() for grad in shards_of(grads))

    def _make_state(self) -> Tensor:
        """Let the base optimizer make its state. Variants add what they remember."""
        self.base_optimizer.step()
        return torch.zeros((), device="cpu")

    @property
    def train(self) -> Callable[[], None]:
        """`train` of a base optimizer that has it, as schedule-free ones have."""
        base: Any = self.base_optimizer
        return base.train  # type: ignore[no-any-return]

    @property
    def eval(self) -> Callable[[], None]:
        """`eval` of a base optimizer that has it, as schedule-free ones have."""
        base: Any = self.base_optimizer
        return base.eval  # type: ignore[no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        self._check_restored("the optimizer was copied or pickled")
        return {"defaults": self.defaults, **{name: getattr(self, name) for name in self._kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        shared: dict[str, Any] = {name: state[name] for name in ("state", "param_groups") if name in state}
        super().__setstate__({name: value for name, value in state.items() if name not in shared})
        if shared:
            self.base_optimizer.__setstate__(shared)
        if "base_optimizer" in state:
            self._snapshot = Snapshot()
            self._watch_loading()


def made(base: Any, params: Any, arguments: dict[str, Any]) -> Optimizer:
    """The base optimizer of these weights: made from its class, or as it is. Raises ValueError."""
    kind = type(base) if isinstance(base, Optimizer) else base.func if isinstance(base, partial) else base
    if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
        name = type(kind).__name__
        raise ValueError(f"base_optimizer must be an optimizer class, got a {name}; pass torch.optim.SGD")
    if issubclass(kind, torch.optim.LBFGS | Wrapper):
        raise ValueError(f"base_optimizer must step without a closure, got {kind.__name__}; use SGD or Adam")
    if not isinstance(base, Optimizer):
        optimizer: Optimizer = base(params, **arguments)
        return optimizer
    if arguments:
        raise ValueError(f"{next(iter(arguments))} must be given to the base optimizer, which is made already")
    groups = [group if isinstance(group, dict) else {"params": [group]} for group in params]
    weights = [{id(weight) for weight in _listed(group["params"])} for group in groups]
    owned = [{id(weight) for weight in group["params"]} for group in base.param_groups]
    if set().union(*weights) != set().union(*owned):
        raise ValueError("params must be the weights of base_optimizer, got others; pass the same to both")
    for group, own in zip(groups, weights, strict=True):
        options = {name: group[name] for name in OPTIONS if name in group}
        if options and own not in owned:
            raise ValueError(f"a group with its own {next(iter(options))} must be a group of base_optimizer, too")
        if options:
            base.param_groups[owned.index(own)].update(options)
    return base


def _listed(weights: Any) -> list[Any]:
    return [weights] if isinstance(weights, Tensor) else list(weights)


def _completed(optimizer: Optimizer, state_dict: dict[str, Any], remembers: Sequence[str]) -> dict[str, Any]:
    """Make a checkpoint fit for the base optimizer of a SAM.

    Options of SAM that it lacks stay as they are in the groups, and what another wrapper remembers is left out. Some
    wrappers have nothing else in their state, and that of their base optimizer beside it.
    """
    groups, saved = optimizer.param_groups, state_dict["param_groups"]
    if len(groups) == len(saved):  # else torch refuses it
        ours = [{name: group[name] for name in OPTIONS if name in group} for group in groups]
        saved = [{**options, **group} for options, group in zip(ours, saved, strict=True)]
    inner = state_dict.get("base_optimizer")
    entries = (inner if isinstance(inner, dict) else state_dict)["state"]
    foreign = _REMEMBERED - set(remembers)
    state = {
        weight: {name: value for name, value in values.items() if name not in foreign}
        if isinstance(values, dict)
        else values
        for weight, values in entries.items()
    }
    return {**state_dict, "state": state, "param_groups": saved}
