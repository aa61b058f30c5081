"""The width-scaled networks: width in, module out."""

from itertools import pairwise

from torch import nn


def mlp(*sizes: int) -> nn.Sequential:
    """Fully connected ReLU network with layers of the given sizes, from the inputs to the outputs."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def tapered_mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """The 3-layer network [width, width / 3] of the paper's MNIST experiments."""
    return mlp(inputs, width, max(1, round(width / 3)), outputs)


def parameter_count(model: nn.Module) -> int:
    """Number of trainable parameters; a tied parameter counts once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
