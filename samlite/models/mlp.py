"""Fully connected networks."""

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
