"""What a pass leaves beside gradients, random states and buffers, and how it is undone."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

# A buffer of a module: the module, the buffer's name, the buffer, and a copy of its value.
KeptBuffer = tuple[nn.Module, str, Tensor, Tensor]
# A module that gets and sets a random state, the device it does so for if it has several, and the state.
RandomState = tuple[Any, tuple[torch.device, ...], Tensor]


def random_state(devices: set[torch.device]) -> list[RandomState]:
    """The state of torch's default generators, on the CPU and on the devices of the weights."""
    generators: list[tuple[Any, tuple[torch.device, ...]]] = [(torch, ())]
    for device in devices:
        if device.type != "cpu":
            where = () if device.type == "mps" else (device,)
            generators.append((torch.get_device_module(device), where))
    return [(module, where, module.get_rng_state(*where)) for module, where in generators]


def replay(states: Sequence[RandomState]) -> None:
    """Set the generators back to these states."""
    for generator, where, state in states:
        generator.set_rng_state(state, *where)


def buffers_of(model: nn.Module | None) -> list[KeptBuffer]:
    """The buffers of a model, such as batch-norm statistics, with copies of their values."""
    return [
        (module, name, buffer, buffer.clone())
        for module in (model.modules() if model is not None else ())
        for name, buffer in module._buffers.items()
        if buffer is not None and not is_lazy(buffer)
    ]


def put_back(kept: Sequence[KeptBuffer]) -> None:
    for module, name, buffer, value in kept:
        setattr(module, name, buffer)  # a module may have put another tensor there
        buffer.copy_(value)


def leaves_of(loss: Tensor) -> Iterator[Tensor]:
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


class Guard:
    """A hook of a model with perturbed weights: it can be copied, to measure it, but neither saved nor loaded."""

    def __call__(self, *_: Any) -> None:
        raise RuntimeError(
            "the model was saved or loaded between first_step and second_step; call second_step before it"
        )

    def __reduce__(self) -> Any:
        return self()

    def __deepcopy__(self, memo: Any) -> "Guard":
        return self
