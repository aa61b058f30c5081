"""Sharpness-aware minimization: step with the gradient found uphill.

A step takes two gradients. The first, g at the weights w, gives a perturbation epsilon towards higher loss.
The second is taken at w + epsilon, and with it the base optimizer steps from w.

    SAM                epsilon = rho g / ‖g‖             Foret et al. 2021, arXiv 2010.01412
    adaptive=True      epsilon = rho |w|² g / ‖|w| g‖    ASAM, Kwon et al. 2021, arXiv 2102.11600
    normalize=False    the same without the division     Andriushchenko, Flammarion 2022, arXiv 2206.06232

The norm runs over all parameters at once, in float32 or wider, and over all shards of a DTensor. Weight decay is
applied by the base optimizer; it does not enter epsilon. Where the base optimizer maximizes, epsilon points downhill.

Limits: gradients must be dense, and a half-precision weight loses a perturbation below its rounding.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.optim.optimizer import Optimizer, ParamsT
from torch.utils.hooks import RemovableHandle

Closure = Callable[[], Tensor]
# An optimizer class, with some of its arguments perhaps.
Base = type[Optimizer] | partial[Any]
TensorList = list[Tensor] | tuple[Tensor, ...]
# A parameter group, with its weights and their gradients that share one device, dtype and sharding.
Bucket = tuple[dict[str, Any], list[Tensor], list[Tensor]]
# A buffer of a module: the module, the buffer's name, the buffer, and a copy of its value.
KeptBuffer = tuple[nn.Module, str, Tensor, Tensor]
# A module that gets and sets a random state, the device it does so for if it has several, and the state.
RandomState = tuple[Any, tuple[torch.device, ...], Tensor]

_OPTIONS = ("rho", "adaptive", "normalize")  # of a group, beside those of the base optimizer
# What wrappers keep in the state of a weight: samlite's own, and those of other implementations of SAM.
_REMEMBERED = {"mean_gradient", "ahead", "old_p", "e_w", "old_g"}


class SAM(Optimizer):
    """SAM over any torch optimizer that steps without a closure.

    ::

        optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, model=model, lr=0.1, momentum=0.9)

        def closure():
            loss = criterion(model(inputs), targets)
            loss.backward()
            return loss

        loss = optimizer.step(closure)

    `param_groups` and `state` are the base optimizer's own, so schedulers and checkpoints work as on any
    optimizer. A group may set its own `rho`, `adaptive` and `normalize`. Only the first pass may change the
    buffers of `model`, such as batch-norm statistics; without `model` both passes change them. A step whose
    first or second gradient is not finite leaves weights, state and the buffers of `model` as they were, and adds
    one to `skipped`.
    With `rho=0` in every group this is the base optimizer, bit for bit and in one pass. With `m` each m closures of a
    list have a perturbation of their own (m-SAM, as Foret et al. train on several accelerators); else all share one.
    `max_norm` clips the gradient that the base optimizer steps with, not the one that perturbs. With a `scaler`
    closures run ``scaler.scale(loss).backward()`` and return the loss; the scaler steps, skips and updates in `step`.
    With DistributedDataParallel every process perturbs by the mean gradient of all, or with ``no_sync=ddp.no_sync`` by
    its own, and then the result depends on how many there are. Weights that `fully_shard` has sharded are perturbed
    shard by shard, with the norm over all of them.
    """

    skipped = 0
    no_sync: Callable[[], AbstractContextManager[Any]] | None = None  # belongs to a process, so copies have none
    # In a pickle, beside the optimizer's own:
    _kept: tuple[str, ...] = ("base_optimizer", "model", "m", "max_norm", "scaler", "skipped")
    _remembers: tuple[str, ...] = ()  # names of what a variant keeps in the state of a weight
    _perturbed: list[list[Tensor]] | None = None  # weights between first_step and second_step, by bucket
    _copies: Sequence[list[Tensor]] = ()  # what they were; the memory is kept from step to step
    _guards: Sequence[RemovableHandle] = ()  # of model, between first_step and second_step
    _had_gradients = False  # whether a pass has left any weight a gradient
    _completed_groups: list[dict[str, Any]] | None = None  # those seen to have a rho, adaptive and normalize
    _first_norm: Tensor

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: Base,
        rho: float = 0.05,
        *,
        adaptive: bool = False,
        normalize: bool = True,
        model: nn.Module | None = None,
        m: int | None = None,
        max_norm: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
        no_sync: Callable[[], AbstractContextManager[Any]] | None = None,
        **base_kwargs: Any,
    ) -> None:
        if not (m is None or (isinstance(m, int) and m >= 1)):
            raise ValueError(f"m must be the number of closures that share a perturbation, >= 1, got {m!r}")
        if not (max_norm is None or 0 < max_norm < math.inf):
            raise ValueError(f"max_norm must be > 0 and finite, got {max_norm!r}")
        kind = base_optimizer.func if isinstance(base_optimizer, partial) else base_optimizer
        if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
            name = type(kind).__name__
            raise ValueError(f"base_optimizer must be an optimizer class, got a {name}; pass torch.optim.SGD")
        if issubclass(kind, torch.optim.LBFGS):
            raise ValueError(f"base_optimizer must step without a closure, got {kind.__name__}; use SGD or Adam")
        if not (model is None or isinstance(model, nn.Module)):
            name = type(model).__name__
            raise ValueError(f"model must be a torch.nn.Module, got a {name}; pass the network itself")
        base: Optimizer = base_optimizer(params, **base_kwargs)
        own = dict(zip(_OPTIONS, (rho, adaptive, normalize), strict=True))
        if clash := sorted(own.keys() & base.defaults.keys()):
            raise ValueError(f"base_optimizer must not have a {clash[0]}, got {kind.__name__}; use SGD or Adam")
        self.base_optimizer = base
        groups, state = base.param_groups, base.state
        super().__init__(groups, {**base.defaults, **own})  # starts with empty ones, and adds each group
        self.param_groups, self.state = groups, state
        self.model, self.m, self.max_norm, self.scaler, self.no_sync = model, m, max_norm, scaler, no_sync
        self._watch_loading()

    @torch.no_grad()
    def step(self, closure: Closure | Sequence[Closure] | None = None) -> Tensor:  # type: ignore[override]
        """Run both passes, step, and return the loss of the first.

        A closure runs forward and backward on one batch and returns its loss. The gradients are zeroed before
        each pass; a lone closure may do so too. A list of closures is one batch in micro-batches of equal
        weight: losses and gradients are averaged over it. The second pass replays the state of torch's
        default random generators; an exception in it restores the weights.
        """
        return self._step(closure)

    def _step(self, closure: Closure | Sequence[Closure] | None) -> Tensor:
        """Step, with gradients switched off: torch calls the hooks of an optimizer around `step` of every class."""
        if self._only_makes_state(closure):
            return self._make_state()
        closures = self._checked(closure)
        plain = self._plain()
        if plain and self.max_norm is None and self._scaler is None:
            loss = self._run(closures)
            with self._out_of_sight():
                self.base_optimizer.step()
            return loss
        with self._undone_if_skipped() if self.model is not None else nullcontext():
            if plain:
                loss = self._run(closures)
                self._first_norm = torch.zeros((), device="cpu")
            else:
                loss = self._both_passes(closures)
            self._descend(self._gradients())
        return loss

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Perturb the weights by the gradients of a first pass.

        Until `second_step`, random state and buffers are in the caller's hands, and neither the optimizer nor `model`
        can be saved: the weights are perturbed.
        """
        if self._perturbed is not None:
            raise RuntimeError("first_step was called twice; call second_step, or zero_grad and second_step")
        if self._scaler:
            raise RuntimeError("first_step cannot unscale gradients; call step(closure), or unscale and pass no scaler")
        if all(weight.grad is None for weight in self._weights()):
            self._check_backward((), "first_step must come after backward", "before it")
        self._had_gradients = True
        try:
            self._ascend()
        except BaseException:
            self._restore()
            raise
        if self.model is not None:
            model: Any = self.model
            registers = (model.register_state_dict_pre_hook, model.register_load_state_dict_pre_hook)
            self._guards = [register(_Guard()) for register in registers]
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Restore the weights, and step with the gradients of a second pass."""
        if self._perturbed is None:
            raise RuntimeError("second_step was called before first_step; call first_step between the passes")
        self._restore()
        self._descend(self._gradients())
        if zero_grad:
            self.zero_grad()

    def _plain(self) -> bool:
        """Whether this is the base optimizer."""
        return not any(group["rho"] for group in self.param_groups)

    def _checked(self, closure: Any) -> Sequence[Closure]:
        closures: Sequence[Any] = closure if isinstance(closure, (list, tuple)) else [closure]
        if not (closures and all(callable(c) for c in closures)):
            raise ValueError(
                "closure must be a function that runs backward and returns the loss, or a list of them, "
                f"got {type(closure).__name__}; to run the passes yourself use first_step and second_step"
            )
        return closures

    def _both_passes(self, closures: Sequence[Closure]) -> Tensor:
        """Leave the gradient to descend by in `.grad`, and return the loss of the first pass.

        With m, each m closures have a perturbation of their own, and their gradients are averaged.
        """
        m = self.m or len(closures)
        if m >= len(closures):
            return self._perturbed_gradient(closures)
        weights = self._weights()
        total: list[Tensor | None] = [None] * len(weights)
        losses, norms = [], []
        for start in range(0, len(closures), m):
            part = closures[start : start + m]
            losses.append(self._perturbed_gradient(part) * (len(part) / len(closures)))
            norms.append(self._first_norm)
            for i, weight in enumerate(weights):
                if weight.grad is not None:
                    share = weight.grad * (len(part) / len(closures))
                    total[i] = share if total[i] is None else total[i] + share
        for weight, grad in zip(weights, total, strict=True):
            weight.grad = grad
        self._first_norm = torch.stack([norm.to(norms[0].device) for norm in norms]).sum()
        return torch.stack(losses).sum()

    def _perturbed_gradient(self, closures: Sequence[Closure]) -> Tensor:
        """Both passes over one batch: leave the gradient at w + epsilon in `.grad`, and return the loss at w."""
        random_state = self._random_state()
        with self.no_sync() if self.no_sync else nullcontext():
            loss = self._run(closures)
        with self._kept_buffers():
            try:
                self._ascend()
                for generator, where, state in random_state:
                    generator.set_rng_state(state, *where)
                self._run(closures)
            finally:
                self._restore()
        return loss

    def _ascend(self) -> None:
        """Add epsilon to the weights, with the gradients of the first pass at hand. Variants differ here."""
        self._perturb(self._gradients())

    def _run(self, closures: Sequence[Closure]) -> Tensor:
        """One pass: leave the mean gradient in `.grad`, return the mean loss."""
        weights = self._weights()
        for weight in weights:  # as zero_grad(), which takes longer to report itself to the profiler
            weight.grad = None
        with torch.enable_grad():
            losses = [closure() for closure in closures]
        for loss in losses:
            if not isinstance(loss, Tensor):
                raise ValueError(f"closure must return its loss, a tensor, got {type(loss).__name__}")
        if not any(weight.grad is not None for weight in weights):
            self._check_backward(losses, "closure must run backward", "in it")
        else:
            self._had_gradients = True
            if len(losses) > 1 or self._scaler:
                grads = _shards([weight.grad for weight in weights if weight.grad is not None])
                torch._foreach_div_(grads, len(losses) * self._scale(grads[0]))
        return losses[0].detach() if len(losses) == 1 else torch.stack(losses).mean()

    def _check_backward(self, losses: Sequence[Tensor], rule: str, where: str) -> None:
        """Raise where no weight has a gradient because backward has not run.

        It has run where the loss depends on other weights only, and one of those has a gradient. A loss without a
        graph may be constant on this batch; but if there has been no gradient before, the closure has detached it.
        """
        weights = {weight for weight in self._weights() if weight.requires_grad}
        leaves = {leaf for loss in losses for leaf in _leaves(loss)}
        ran = any(leaf.grad is not None for leaf in leaves) if leaves else self._had_gradients
        if weights and (not ran or leaves & weights):
            raise ValueError(f"{rule}, but no weight has a gradient; call loss.backward() {where}")

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        """The scaler, unless it is disabled: then it does nothing."""
        return self.scaler if self.scaler is not None and self.scaler.is_enabled() else None

    def _scale(self, like: Tensor) -> Any:
        """What the scaler multiplies losses by: a number on the device, which nobody waits for; 1 without a scaler."""
        return self._scaler.scale(like.new_ones(())) if self._scaler else 1

    def _gradients(self) -> list[Bucket]:
        """The weights that have a gradient, with it in float32 or wider, sharded as the weight is."""
        buckets: list[Bucket] = []
        for group in self.param_groups:
            kinds: dict[Any, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
            for weight in group["params"]:
                grad = weight.grad
                if grad is None:
                    continue
                if grad.layout != torch.strided:
                    raise ValueError(f"gradients must be dense, got {grad.layout}; use sparse=False")
                if hasattr(weight, "_fsdp_flattened"):  # a shard that says nothing of the others
                    raise ValueError("params must not be those of FullyShardedDataParallel; use fully_shard (FSDP2)")
                sharding = _sharding(weight)
                if sharding and sharding != _sharding(grad):
                    grad = grad.redistribute(*sharding)
                weights, grads = kinds[weight.device, weight.dtype, sharding]
                weights.append(weight)
                grads.append(grad.float() if grad.dtype in (torch.float16, torch.bfloat16) else grad)
            buckets += [(group, weights, grads) for weights, grads in kinds.values()]
        return buckets

    def _perturb(self, buckets: list[Bucket]) -> None:
        """Save the weights and add epsilon to them."""
        self._save([weights for _, weights, _ in buckets])
        self._first_norm = self._add(buckets)

    def _save(self, weights: list[list[Tensor]]) -> None:
        """Keep copies of the weights, for `_restore`."""
        weights = [_shards(bucket) for bucket in weights]
        old: list[list[Tensor]] = [*self._copies, *([] for _ in weights)]
        self._copies = [_copied(bucket, copies) for bucket, copies in zip(weights, old, strict=False)]
        self._perturbed = weights

    def _add(self, buckets: list[Bucket], rho: float | None = None) -> Tensor:
        """Add epsilon to the weights, with the radius of their group if none is given; return the norm divided by."""
        shards = [(group, _shards(weights), _shards(grads)) for group, weights, grads in buckets]
        directions = [
            torch._foreach_mul(grads, torch._foreach_abs(weights)) if group["adaptive"] else grads
            for group, weights, grads in shards
        ]
        norm = _norm(buckets, directions)
        # A norm so small that its squares underflow is not to be trusted; a zero gradient stays zero.
        numbers = torch.finfo(norm.dtype)
        divisor = norm.clamp_min(math.sqrt(numbers.tiny / numbers.eps))
        for (group, weights, _), direction in zip(shards, directions, strict=True):
            if group["adaptive"]:
                direction = torch._foreach_mul(direction, torch._foreach_abs(weights))
            radius = group["rho"] if rho is None else rho
            radius = -radius if group.get("maximize") else radius
            if group["normalize"]:
                divisors = [divisor.to(weights[0].device)] * len(weights)
                torch._foreach_addcdiv_(weights, direction, divisors, value=radius)
            else:
                torch._foreach_add_(weights, direction, alpha=radius)
        forget_old_weights()
        return norm

    def _restore(self) -> None:
        """Copy the saved weights back, in place: subtracting epsilon would round."""
        for weights, copies in zip(self._perturbed or [], self._copies, strict=False):
            torch._foreach_copy_(weights, copies)
        forget_old_weights()
        self._perturbed = None
        for guard in self._guards:
            guard.remove()
        self._guards = []

    def _descend(self, buckets: list[Bucket]) -> None:
        """Let the base optimizer step, if both gradients are finite."""
        norm = _norm(buckets, [_shards(grads) for _, _, grads in buckets])
        if self.max_norm is not None:
            for _, weights, _ in buckets:
                shrink = (self.max_norm / norm.clamp_min(self.max_norm)).to(weights[0].device)
                grads: list[Any] = [weight.grad for weight in weights]
                torch._foreach_mul_(_shards(grads), shrink)
        # The one wait for the device in a step, hence after both passes. It cannot be left to the device: the
        # base optimizer keeps part of its state on the host.
        finite = math.isfinite(norm + self._first_norm.to(norm.device))
        with self._out_of_sight() if self._remembers else nullcontext():
            if self._scaler:
                self._scaled_step(self._scaler, finite)
            elif finite:
                self.base_optimizer.step()
        if finite:
            self._stepped()
        else:
            self.skipped += 1
        self._opt_called = True  # a scheduler warns if no step came before its own

    def _scaled_step(self, scaler: torch.amp.GradScaler, finite: bool) -> None:
        """Let the scaler step or skip, and adapt its scale: it wants gradients that it has unscaled itself."""
        grads = _shards([weight.grad for weight in self._weights() if weight.grad is not None])
        if grads:
            torch._foreach_mul_(grads, self._scale(grads[0]))
            if not finite:  # what the first gradient had need not show in the second
                for grad in grads:  # the first one may have no element in this shard
                    grad.fill_(math.nan)
            scaler.step(self.base_optimizer)
            scaler.update()

    def _stepped(self) -> None:
        """The base optimizer has stepped. Variants keep what they need for the next step."""

    def _random_state(self) -> list[RandomState]:
        """The state of torch's default generators, on the CPU and on the devices of the weights."""
        generators: list[tuple[Any, tuple[torch.device, ...]]] = [(torch, ())]
        for device in {weight.device for group in self.param_groups for weight in group["params"]}:
            if device.type != "cpu":
                where = () if device.type == "mps" else (device,)
                generators.append((torch.get_device_module(device), where))
        return [(module, where, module.get_rng_state(*where)) for module, where in generators]

    @contextmanager
    def _kept_buffers(self) -> Iterator[None]:
        """The buffers of the model, such as batch-norm statistics, are put back behind the pass inside."""
        kept = self._buffers()
        try:
            yield
        finally:
            _put_back(kept)

    @contextmanager
    def _undone_if_skipped(self) -> Iterator[None]:
        """If the step inside is skipped, the buffers of the model are put back to what they were before it."""
        kept, skipped = self._buffers(), self.skipped
        yield
        if self.skipped > skipped:
            _put_back(kept)

    def _buffers(self) -> list[KeptBuffer]:
        return [
            (module, name, buffer, buffer.clone())
            for module in (self.model.modules() if self.model is not None else ())
            for name, buffer in module._buffers.items()
            if buffer is not None and not is_lazy(buffer)
        ]

    def _grads(self) -> dict[Tensor, Tensor]:
        """Copies of the gradients at hand."""
        return {weight: weight.grad.clone() for weight in self._weights() if weight.grad is not None}

    def _weights(self) -> list[Any]:
        return [weight for group in self.param_groups for weight in group["params"]]

    # One state and one list of groups, which are the base optimizer's, however they are replaced or loaded.

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
                for name in _OPTIONS:
                    group.setdefault(name, self.defaults[name])
            self._completed_groups = groups
        return groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as on any optimizer; it may set its own rho, adaptive and normalize."""
        for name in _OPTIONS:
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
        if self._perturbed is not None:
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
        return all(grad is not None for grad in grads) and not any(grad.any() for grad in _shards(grads))

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
            self._watch_loading()


def _completed(optimizer: Optimizer, state_dict: dict[str, Any], remembers: Sequence[str]) -> dict[str, Any]:
    """Make a checkpoint fit for the base optimizer of a SAM.

    Options of SAM that it lacks stay as they are in the groups, and what another wrapper remembers is left out. Some
    wrappers have nothing else in their state, and that of their base optimizer beside it.
    """
    groups, saved = optimizer.param_groups, state_dict["param_groups"]
    if len(groups) == len(saved):  # else torch refuses it
        ours = [{name: group[name] for name in _OPTIONS if name in group} for group in groups]
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


class _Guard:
    """A hook of a model with perturbed weights: it can be copied, to measure it, but neither saved nor loaded."""

    def __call__(self, *_: Any) -> None:
        raise RuntimeError(
            "the model was saved or loaded between first_step and second_step; call second_step before it"
        )

    def __reduce__(self) -> Any:
        return self()

    def __deepcopy__(self, memo: Any) -> "_Guard":
        return self


def forget_old_weights() -> None:
    """Make regions around the step compute anew what they keep of the weights: casts, and parametrized ones."""
    torch.clear_autocast_cache()
    parametrize._cache.clear()


def _put_back(kept: Sequence[KeptBuffer]) -> None:
    for module, name, buffer, value in kept:
        setattr(module, name, buffer)  # a module may have put another tensor there
        buffer.copy_(value)


def _leaves(loss: Tensor) -> Iterator[Tensor]:
    """The leaves of the graph of a loss."""
    nodes: list[Any] = [loss.grad_fn]
    seen = {None}
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        nodes += [parent for parent, _ in node.next_functions]


def _sharding(tensor: Any) -> Any:
    """The mesh and the placements of a DTensor; None of any other tensor."""
    return (tensor.device_mesh, tensor.placements) if hasattr(tensor, "device_mesh") else None


def _shards(tensors: Sequence[Any]) -> list[Tensor]:
    """The part of each tensor that this process holds: everything but a norm is computed element by element."""
    return [tensor.to_local() if hasattr(tensor, "device_mesh") else tensor for tensor in tensors]


def _copied(weights: list[Tensor], old: list[Tensor]) -> list[Tensor]:
    """Copies of the weights, over old ones that fit: on a CPU fresh memory costs more than the copying."""
    if not old or _kind(weights) != _kind(old):
        return [weight.clone() for weight in weights]
    torch._foreach_copy_(old, weights)
    return old


def _kind(tensors: list[Tensor]) -> Any:
    return [(tensor.device, tensor.dtype, tensor.shape) for tensor in tensors]


def _norm(buckets: Sequence[Bucket], directions: Sequence[TensorList]) -> Tensor:
    """The Euclidean norm of all directions together, each the shards of the bucket beside it."""
    norms: list[Tensor] = []
    for (_, weights, _), direction in zip(buckets, directions, strict=True):
        parts = torch._foreach_norm(direction)
        norms += [_over_shards(parts, weights[0])] if _sharding(weights[0]) else parts
    if not norms:
        return torch.zeros((), device="cpu")
    if len(directions) > 1:
        norms = [norm.to(norms[0].device) for norm in norms]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def _over_shards(norms: TensorList, like: Tensor) -> Tensor:
    """The norm over all processes of shards whose norms are given here, sharded like a DTensor."""
    from torch.distributed.tensor import DTensor, Partial  # there already, but slow to import

    mesh, placements = _sharding(like)
    partial_sums = [placement if placement.is_replicate() else Partial() for placement in placements]
    square = torch.stack(norms).double().square().sum()
    whole: Tensor = DTensor.from_local(square, mesh, partial_sums, run_check=False).full_tensor()
    return whole.sqrt().to(norms[0])
