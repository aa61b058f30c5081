"""ImageNet (Russakovsky et al. 2015), or any set of photographs in classes, read from the disk as it is needed.

Worker processes decode the images, so the set is never in memory. The order of the batches and every random crop are
functions of the generator of an epoch and of the row, and so the same for any number of workers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from samlite.data.images import Table, tables
from samlite.errors import UsageError
from samlite.models import resnet50
from samlite.seeds import generator
from samlite.tasks.task import Accuracy, Batch, Recipe, Scores, Splits, Task, hold_out

if TYPE_CHECKING:
    from PIL.Image import Image


# Of the training pixels scaled to [0, 1], a number a channel.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of random crops: share of the image, width by height
BORDER = 256 / 224  # the shorter side in evaluation, by the size of the crop
SCORED = 50_000  # training images evaluated after an epoch, as many as the test split has
CLASSES = 1000  # where the data do not say


@dataclass(frozen=True)
class Photographs:
    """Samples on the disk; only their targets are in memory."""

    table: Table
    rows: Tensor  # of the table, (n,), on the CPU
    targets: Tensor  # (n,), on the device
    size: int = 224  # pixels, of the squares that the network sees
    workers: int = 0  # processes that decode; 0: this one
    scored: int | None = None  # samples that an evaluation looks at; None: all

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
        """As of `Data`: bytes (n, 3, size, size). With augment, random crops and mirror images by the generator.

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
            collate_fn=_stacked,
            num_workers=min(self.workers, _processors()),
            generator=torch.Generator(),  # or it would draw from the global one
        )
        for part, images in zip(parts, loader, strict=True):
            if isinstance(images, str):
                raise UsageError(images)
            yield images.to(self.targets.device), self.targets[part.to(self.targets.device)]


@dataclass(frozen=True)
class _Decoder:
    """Rows to images as bytes (3, size, size), or to what is wrong: an error itself would lose its place on the way."""

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


def _stacked(images: list[Tensor | str]) -> Tensor | str:
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


def load(source: str | None, seed: int) -> Splits:
    """Photographs of any size; the same splits for every seed.

    source is a hub id, a folder of parquet files, or one of class folders: train/CLASS/x.jpeg and
    validation/CLASS/x.jpeg (or val). The labels of the official test split are secret, so the official validation
    split is the test split here, and a tenth of train is held out for validation. Raises UsageError that names the
    column and row of a bad label; a bad image shows when it is read.
    """
    (train, test), classes = tables(source, "imagenet", ("train", "validation"))
    outputs = classes or CLASSES
    return Splits(
        *hold_out(replace(_photographs(train, outputs), scored=SCORED)),
        _photographs(test, outputs),
        {"outputs": outputs},
    )


def _photographs(table: Table, classes: int) -> Photographs:
    return Photographs(table, torch.arange(len(table)), table.labels(classes))


@dataclass(frozen=True)
class ImageNet(Task):
    """A task whose data stay on the disk."""

    @property
    def augments(self) -> bool:
        return True

    def with_settings(self, settings: Mapping[str, float]) -> Task:
        """As of `Task`. Raises UsageError where they are no integers."""
        for name, least in (("size", 1), ("workers", 0)):
            if settings[name] < least or settings[name] % 1:
                raise UsageError(f"settings: {name} must be an integer >= {least}, got {settings[name]:g}")
        return super().with_settings(settings)

    def splits(self, source: str | None, seed: int) -> Splits:
        """The data at the size and with the workers of the settings."""
        data = super().splits(source, seed)
        size, workers = (int(self.recipe.settings[name]) for name in ("size", "workers"))
        train, validation, test = (
            replace(part, size=size, workers=workers) for part in (data.train, data.validation, data.test)
        )
        return Splits(train, validation, test, data.sizes)

    def classes_in(self, data: Splits) -> int | None:
        """As of `Task`: class folders may be of any number."""
        return data.sizes["outputs"]

    def batches(
        self, model: nn.Module, data: Photographs, batch_size: int, order: torch.Generator, augment: bool
    ) -> Iterator[Batch]:
        """As of `Task`; the augmentation is a random crop of any size, scaled, and a mirror image half of the time."""
        return data.batches(batch_size, order, augment)

    def evaluate(self, model: nn.Module, data: Photographs) -> Scores:
        """As of `Task`; of training data on 50,000 samples, always the same ones, without augmentation.

        All of them after every epoch would take a third of its time again.
        """
        if data.scored is not None and data.scored < len(data):
            order = torch.randperm(len(data), generator=generator("scored samples", 0))
            data = data[order[: data.scored].sort().values.to(data.targets.device)]
        return super().evaluate(model, data)

    def measured(self, model: nn.Module, data: Photographs, count: int, seed: int) -> tuple[Any, int]:
        """As of `Task`; decoded once, as every product passes over them: 1.2 GB for 8,192 samples of 224 pixels."""
        batches, number = super().measured(model, data, count, seed)
        inputs, targets = zip(*batches, strict=True)
        return (torch.cat(inputs), torch.cat(targets)), number


TASK = ImageNet(
    name="imagenet",
    summary="photographs of 1,000 kinds, from the disk",
    network="ResNet-50, w filters in the first stage",
    data="ImageNet from the hub, or a folder of parquet files or of class folders: 1,153,050 training, 128,117 "
    "validation, 50,000 test",
    model=partial(resnet50, mean=MEAN, std=STD, outputs=CLASSES),
    load=load,
    loss=nn.CrossEntropyLoss(),
    metric="accuracy",
    meter=Accuracy,
    classes=CLASSES,
    recipe=Recipe(
        lr={"sgd": 0.2, "adam": 1e-3, "adamw": 1e-3},
        batch_size=512,
        epochs=90,
        weight_decay=1e-4,
        milestones=(1 / 3, 2 / 3),
        threads=2,
        settings={"size": 224, "workers": 8},
    ),
    width=64,
    widths=(16, 32, 48, 64),
    extra="data",
    source="ILSVRC/imagenet-1k",
    chunk=256,
)
