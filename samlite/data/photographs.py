"""Photographs of any size that stay on the disk: worker processes decode and crop them as they are needed.

The generator of an epoch and the row decide the order of the batches and every random crop, so they are the same for
any number of workers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from samlite.data.images import Table
from samlite.data.tensors import Batch
from samlite.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of random crops: share of the image, width by height
BORDER = 256 / 224  # the shorter side in evaluation, by the size of the crop


@dataclass(frozen=True)
class Photographs:
    """Samples on the disk; only their targets are in memory."""

    table: Table
    rows: Tensor
    """Row numbers of the table (n,), on the CPU."""
    targets: Tensor
    """Class numbers (n,), on the device."""
    size: int = 224
    """The side, in pixels, of the squares that the network sees."""
    workers: int = 0
    """The number of processes that decode; 0 decodes in this one."""
    scored: int | None = None
    """How many samples an evaluation looks at; None for all."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Tensor | slice) -> Photographs:
        there = rows.cpu() if isinstance(rows, Tensor) else rows
        return replace(self, rows=self.rows[there], targets=self.targets[rows])

    def to(self, device: torch.device | str) -> Photographs:
        return replace(self, targets=self.targets.to(device))

    def batches(
        self, batch_size: int, generator: torch.Generator | None = None, augment: bool = False
    ) -> Iterator[Batch]:
        """Batches of bytes (n, 3, size, size); with `augment` the generator draws random crops and mirror images.

        Raises UsageError with the file or row of an image that cannot be read.
        """
        order = torch.arange(len(self))
        seed = None
        if generator is not None:
            order = torch.randperm(len(self), generator=generator)
            seed = int(torch.randint(2**62, (), generator=generator)) if augment else None
        parts = torch.split(order, batch_size)
        loader: DataLoader[Tensor | str] = DataLoader(
            _Decoder(self.table, self.size, seed),  # type: ignore[arg-type]  # all that a loader needs of a data set
            batch_sampler=[self.rows[part].tolist() for part in parts],
            collate_fn=_stack,
            num_workers=min(self.workers, _processors()),
            generator=torch.Generator(),  # or it would draw from the global one
        )
        for part, images in zip(parts, loader, strict=True):
            if isinstance(images, str):
                raise UsageError(images)
            yield images.to(self.targets.device), self.targets[part.to(self.targets.device)]


@dataclass(frozen=True)
class _Decoder:
    """Turns rows into images (3, size, size) of bytes, or into a message: an exception would lose its place."""

    table: Table
    size: int
    seed: int | None  # of random crops

    def __getitem__(self, row: int) -> Tensor | str:
        try:
            image = self.table.image(row, "RGB")
        except ValueError as error:
            return str(error)
        square = central(image, self.size) if self.seed is None else random(image, self.size, (self.seed, row))
        return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def _stack(images: list[Tensor | str]) -> Tensor | str:
    wrong = next((image for image in images if isinstance(image, str)), None)
    return torch.stack(images) if wrong is None else wrong  # type: ignore[arg-type]


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def central(image: Image, size: int) -> Image:
    """The middle of an image, size pixels of a shorter side that is scaled to 8/7 of them."""
    side = min(image.size) / BORDER
    return _cut(image, side, side, 0.5, 0.5, size)


def random(image: Image, size: int, seed: tuple[int, int]) -> Image:
    """A random part of an image scaled to size×size pixels, mirrored half of the time. The seed decides it."""
    from PIL.Image import Transpose

    draw = np.random.default_rng(seed)
    width, height = _extent(image, draw)
    square = _cut(image, width, height, draw.random(), draw.random(), size)
    return square.transpose(Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else square


def _extent(image: Image, draw: np.random.Generator) -> tuple[float, float]:
    """Width and height of a random crop: the first of ten draws that fits, else the largest square."""
    for _ in range(10):
        area = draw.uniform(*AREA) * image.width * image.height
        ratio = RATIO[0] * (RATIO[1] / RATIO[0]) ** draw.random()
        width, height = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if width <= image.width and height <= image.height:
            return width, height
    return min(image.size), min(image.size)


def _cut(image: Image, width: float, height: float, x: float, y: float, size: int) -> Image:
    """The part of this extent, so far across and down (0 ... 1) as there is room, scaled to size×size pixels."""
    from PIL.Image import Resampling

    left, top = x * (image.width - width), y * (image.height - height)
    box = (left, top, min(left + width, image.width), min(top + height, image.height))  # rounding may pass the border
    return image.resize((size, size), Resampling.BILINEAR, box)
