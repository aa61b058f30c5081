"""One evaluation of a model that leaves no trace: nothing that a forward pass writes outlives it."""

import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from samlite.curvature.neutral import without_hooks
from samlite.curvature.stand_ins import TwiceDifferentiable, without_checkpointing
from samlite.errors import UsageError

_OF_MODULES = frozenset(vars(nn.Module()))  # attributes that torch itself keeps in a module
_CONTAINERS = (list, dict, set)


# --- Around a look at the data


class Draws:
    """Random states of torch, Python and numpy for data to draw from, beside those of everybody else."""

    def __init__(self, seed: int) -> None:
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(seed)
            python = random.Random(seed).getstate()
            self._states = torch.get_rng_state(), python, np.random.RandomState(seed).get_state()  # noqa: NPY002

    @contextmanager
    def used(self) -> Iterator[None]:
        """What is drawn inside is drawn from these."""
        outside = self._exchanged(self._states)
        try:
            yield
        finally:
            self._states = self._exchanged(outside)

    @staticmethod
    def _exchanged(states: tuple[Any, ...]) -> tuple[Any, ...]:
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])  # noqa: NPY002
        return before


# --- Around one evaluation


@contextmanager
def untouched(
    model: nn.Module,
    held: Sequence[nn.Module],
    parameters: Iterable[Tensor],
    mode: str,
    seed: int = 0,
    deeper: bool = False,
) -> Iterator[TwiceDifferentiable]:
    """Forward passes inside can be differentiated twice by `parameters` and leave no trace on the modules.

    Modes, buffers, plain attributes, `requires_grad` and the random state are put back, on errors too. Weights are not
    copied: a forward pass that writes into one is refused.

    Args:
        held: modules that the loss uses beside the model; their modes stay as they are.
        seed: of torch's random numbers.
        deeper: whether the loss differentiates inside; what is given knows afterwards.

    Raises:
        UsageError: the forward pass wrote into a parameter.
    """
    modules = distinct_modules([model, *held])
    like = next(iter(model.parameters()))
    device = like.device
    everything = [p for module in modules for p in module._parameters.values() if p is not None]
    versions = [p._version for p in everything]
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(range(torch.cuda.device_count())))
        _seed(device, seed)
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # fused attention has no second derivative
        stack.enter_context(_without_encoder_fast_path())  # nor have the nested tensors of torch's Transformer
        if device.type == "cuda" and any(isinstance(m, nn.RNNBase) for m in modules):
            stack.enter_context(
                torch.backends.cudnn.flags(enabled=False, allow_tf32=False)
            )  # nor have cuDNN's recurrent layers
        if "torch._dynamo" in sys.modules:  # nor have compiled graphs
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(without_checkpointing())
        functions = stack.enter_context(TwiceDifferentiable(like.dtype == torch.float64, deeper))
        stack.enter_context(_fresh_caches())
        stack.enter_context(_own_state(modules))
        stack.enter_context(_only(parameters, everything))
        stack.enter_context(without_hooks(everything))
        model.train(mode == "train")
        for module in modules:
            if isinstance(module, nn.Embedding):
                module.sparse = module.scale_grad_by_freq = False  # these change the gradient, not the loss
                if module.max_norm is not None:
                    stack.enter_context(_projected(module))
            if isinstance(module, DistributedDataParallel):  # wait for no other process
                module.require_backward_grad_sync = module.require_forward_param_sync = False
        yield functions
    if versions != [p._version for p in everything]:
        raise UsageError(
            "the forward pass must leave the parameters as they are, got one that writes into them; "
            "move what it does there out of the forward pass"
        )


def distinct_modules(roots: Iterable[nn.Module]) -> list[nn.Module]:
    """All modules under these, each once."""
    return list({id(module): module for root in roots for module in root.modules()}.values())


def _seed(device: torch.device, seed: int) -> None:
    """As torch.manual_seed, which takes a millisecond where CUDA is not in use."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)


@contextmanager
def _without_encoder_fast_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _fresh_caches() -> Iterator[None]:
    """No weights that autocast or `parametrize.cached` kept from a pass before, which may lack a graph."""
    before = parametrize._cache_enabled, parametrize._cache
    parametrize._cache_enabled, parametrize._cache = 0, {}
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        parametrize._cache_enabled, parametrize._cache = before
        torch.clear_autocast_cache()


@contextmanager
def _only(parameters: Iterable[Tensor], everything: Iterable[Tensor]) -> Iterator[None]:
    """Only these parameters require a gradient, of everything that does."""
    wanted = {id(p) for p in parameters}
    others = [p for p in everything if p.requires_grad and id(p) not in wanted]
    try:
        for p in others:
            p.requires_grad_(False)
        yield
    finally:
        for p in others:
            p.requires_grad_(True)


@contextmanager
def _own_state(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run on copies of buffers and of plain attributes, and put the originals back.

    Values are not put back in place, which would invalidate graphs that saved them. What modules share stays shared.
    """
    copies: dict[int, Any] = {}
    scripted = [
        buffer for module in modules if isinstance(module, torch.jit.ScriptModule) for buffer in module.buffers()
    ]
    values = [buffer.clone() for buffer in scripted]  # which cannot be exchanged
    before = [
        (module, dict(vars(module)), dict(module._parameters), dict(module._buffers), dict(module._modules))
        for module in modules
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    try:
        for module, attributes, _, buffers, _ in before:
            for name, buffer in buffers.items():
                if buffer is not None:
                    module._buffers[name] = copies.setdefault(id(buffer), buffer.detach().clone())
            for name, value in attributes.items():
                if name not in _OF_MODULES and isinstance(value, (Tensor, *_CONTAINERS)):
                    vars(module)[name] = _copied(value, copies)
        yield
    finally:
        for buffer, value in zip(scripted, values, strict=True):
            if not torch.equal(buffer, value):
                buffer.copy_(value)
        for module, attributes, parameters, buffers, children in before:
            here: Any = (
                (module._parameters, parameters),
                (module._buffers, buffers),
                (module._modules, children),
                (vars(module), attributes),
            )
            for inner, then in here:
                for name in inner.keys() - then.keys():
                    del inner[name]
                inner.update(then)


def _copied(value: Any, copies: dict[int, Any]) -> Any:
    """A copy of tensors without a gradient, and of plain containers with those in them."""
    if id(value) in copies:
        return copies[id(value)]
    copy = value
    if type(value) is Tensor and not value.requires_grad:
        copy = value.clone()
    elif type(value) in _CONTAINERS:
        copy = copies[id(value)] = type(value)()  # before its contents, which may hold it
        if isinstance(value, dict):
            copy.update({key: _copied(part, copies) for key, part in value.items()})
        elif isinstance(value, list):
            copy.extend(_copied(part, copies) for part in value)
        else:
            copy.update(value)
    copies[id(value)] = copy
    return copy


@contextmanager
def _projected(module: nn.Embedding) -> Iterator[None]:
    """Rows longer than `max_norm` are shortened on the way out, with the gradient that torch gives them.

    torch shortens them in place, which changes the weights and invalidates graphs.
    """
    limit, power = module.max_norm, module.norm_type
    assert limit is not None

    def shorten(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        fixed = output.detach()
        norm = fixed.norm(power, dim=-1, keepdim=True)
        scale = torch.where(norm > limit, limit / (norm + 1e-7), 1)  # as torch rounds it
        return output + fixed * (scale - 1)

    module.max_norm = None  # an attribute, which is put back with the others
    handle = module.register_forward_hook(shorten, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def modules_in(loss_fn: Any) -> list[nn.Module]:
    """The modules that a loss holds: it is one, closes over one, names one, or is bound to one."""
    modules: list[nn.Module] = []
    unseen, seen = [loss_fn], set()
    while unseen:
        part = unseen.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, nn.Module):
            modules.append(part)
        elif isinstance(part, partial):
            unseen += [part.func, *part.args, *part.keywords.values()]
        elif hasattr(part, "__self__") and hasattr(part, "__func__"):
            unseen += [part.__self__, part.__func__]
        elif hasattr(part, "__code__"):
            cells = [cell.cell_contents for cell in part.__closure__ or () if _filled(cell)]
            named = [part.__globals__.get(name) for name in part.__code__.co_names]
            unseen += [*cells, *(part.__defaults__ or ()), *(each for each in named if isinstance(each, nn.Module))]
        elif part is loss_fn or isinstance(part, list | tuple):
            unseen += list(part) if isinstance(part, list | tuple) else list(getattr(part, "__dict__", {}).values())
    return modules


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
