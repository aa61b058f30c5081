"""A vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929) for small images.

Differences: the mean over patches in place of a class token, which small images do without (Beyer, Zhai, Kolesnikov
2022, arXiv 2205.01580), and layer norm before each branch and at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samlite.errors import UsageError
from samlite.models.resnet import Normalize

PATCH = 4  # pixels: 64 patches of a 32×32 image; patches of 8 lose detail, and of 2 cost 16 times the attention
DEPTH = 6  # as deep as trains in hours on a CPU; depth does not scale with the width
HEADS = 4  # at every width, so that only the width changes
EXPANSION = 2  # of the hidden layers, half the usual: images are few


class Attention(nn.Module):
    """Self-attention over tokens (n, tokens, width), its dropout behind the output."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.inner(tokens).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        output: Tensor = self.dropout(self.outer(mixed.transpose(1, 2).flatten(2)))
        return output


class Block(nn.Module):
    """tokens + attention, then + a two-layer network."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, dropout))
        self.network = nn.Sequential(
            *(nn.LayerNorm(width), nn.Linear(width, EXPANSION * width), nn.GELU()),
            *(nn.Linear(EXPANSION * width, width), nn.Dropout(dropout)),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(tokens)
        output: Tensor = tokens + self.network(tokens)
        return output


class Patches(nn.Module):
    """Images (n, 3, size, size) to tokens (n, patches, width) with learned positions."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, PATCH, stride=PATCH)
        self.positions = nn.Parameter(0.02 * torch.randn((size // PATCH) ** 2, width))

    def forward(self, images: Tensor) -> Tensor:
        patches: Tensor = self.embed(images)
        return patches.flatten(2).transpose(1, 2) + self.positions


class Mean(nn.Module):
    """The mean over tokens."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.mean(1)


def vit(
    width: int, *, size: int, mean: Sequence[float], std: Sequence[float], outputs: int, dropout: float = 0.0
) -> nn.Sequential:
    """For images of size×size pixels in bytes. Raises UsageError where the heads do not divide the width."""
    if width % HEADS:
        raise UsageError(f"width must be a multiple of {HEADS}, the number of heads, got {width}")
    return nn.Sequential(
        *(Normalize(mean, std), Patches(width, size)),
        *(Block(width, dropout) for _ in range(DEPTH)),
        *(nn.LayerNorm(width), Mean(), nn.Linear(width, outputs)),
    )
