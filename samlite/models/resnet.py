"""Residual networks (He, Zhang, Ren, Sun 2016, arXiv 1512.03385): stages of f, 2f, 4f and 8f filters.

Images come as bytes and are normalised in the network, so that a data set takes a byte a number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Normalize(nn.Module):
    """Images of 0 ... 255 (n, channels, height, width) to mean 0 and variance 1 a channel, in the type of the weights.

    mean and std are those of the channels scaled to [0, 1].
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    mean: Tensor
    std: Tensor

    def forward(self, images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=torch.channels_last)  # convolutions on a CPU are faster so
        return (images.to(self.mean) / 255 - self.mean) / self.std


def convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    """A convolution without bias, which the batch norm behind it would remove."""
    layer = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    """relu(branch(x) + shortcut(x)); the shortcut is a 1×1 convolution where shapes differ."""

    def __init__(self, branch: nn.Sequential, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.branch = branch
        same = inputs == outputs and stride == 1
        self.stride = stride
        self.shortcut = nn.Identity() if same else convolution(inputs, outputs, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        # A 1×1 convolution with a stride is one of the numbers that it meets. As such torch 2.13 writes beside its
        # memory, in the backward pass on a CPU with AVX2, where there are fewer than 8 channels.
        met = inputs if self.stride == 1 else inputs[..., :: self.stride, :: self.stride]
        return F.relu(self.branch(inputs) + self.shortcut(met))


def basic(inputs: int, filters: int, stride: int) -> Residual:
    """Two 3×3 convolutions."""
    branch = nn.Sequential(convolution(inputs, filters, 3, stride), nn.ReLU(), convolution(filters, filters, 3))
    return Residual(branch, inputs, filters, stride)


def bottleneck(inputs: int, filters: int, stride: int) -> Residual:
    """1×1, 3×3 and 1×1 convolutions, the last to four times the filters; the 3×3 one has the stride."""
    branch = nn.Sequential(
        *(convolution(inputs, filters, 1), nn.ReLU()),
        *(convolution(filters, filters, 3, stride), nn.ReLU()),
        convolution(filters, 4 * filters, 1),
    )
    return Residual(branch, inputs, 4 * filters, stride)


def resnet18(filters: int, *, mean: Sequence[float], std: Sequence[float], outputs: int) -> nn.Sequential:
    """For images of 32×32 pixels: a 3×3 convolution, then 8 basic blocks. 256 filters, 10 outputs: 179M parameters."""
    blocks, channels = [], filters
    for stage in range(4):
        for block in range(2):
            out = filters * 2**stage
            blocks.append(basic(channels, out, stride=2 if stage and not block else 1))
            channels = out
    return nn.Sequential(
        Normalize(mean, std), convolution(3, filters, 3), nn.ReLU(), *blocks, *_head(channels, outputs)
    )


def resnet50(filters: int, *, mean: Sequence[float], std: Sequence[float], outputs: int) -> nn.Sequential:
    """For images of 224×224 pixels, halved twice before 16 bottlenecks. 64 filters, 1000 outputs: 25.6M parameters."""
    blocks, channels = [], filters
    for stage, number in enumerate((3, 4, 6, 3)):
        for block in range(number):
            blocks.append(bottleneck(channels, filters * 2**stage, stride=2 if stage and not block else 1))
            channels = 4 * filters * 2**stage
    stem = [convolution(3, filters, 7, stride=2), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)]
    return nn.Sequential(Normalize(mean, std), *stem, *blocks, *_head(channels, outputs))


def _head(channels: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, outputs)
