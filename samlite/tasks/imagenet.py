"""ImageNet (Russakovsky et al. 2015), or any set of photographs in classes, read from the disk as it is needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from samlite.data.images import Table, tables
from samlite.data.photographs import Photographs
from samlite.data.tensors import Batch, Splits, hold_out
from samlite.errors import UsageError
from samlite.models import resnet50
from samlite.seeds import generator
from samlite.tasks.metrics import Accuracy
from samlite.tasks.task import Classification, Recipe, Scores, Task

if TYPE_CHECKING:
    pass


# Of the training pixels scaled to [0, 1], a number a channel.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCORED = 50_000  # training images evaluated after an epoch, as many as the test split has
CLASSES = 1000  # where the data do not say


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
class ImageNet(Classification):
    """A task whose data stay on the disk."""

    @property
    def augments(self) -> bool:
        return True

    def with_settings(self, settings: Mapping[str, float]) -> Task:
        """Check the settings. Raises UsageError where size or workers is no integer."""
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

    def batches(
        self, model: nn.Module, data: Photographs, batch_size: int, order: torch.Generator, augment: bool
    ) -> Iterator[Batch]:
        """With `augment` each image is a random crop, scaled, and mirrored half of the time."""
        return data.batches(batch_size, order, augment)

    def evaluate(self, model: nn.Module, data: Photographs) -> Scores:
        """Evaluate without augmentation; training data on 50,000 samples, always the same ones.

        All of them after every epoch would take a third of its time again.
        """
        if data.scored is not None and data.scored < len(data):
            order = torch.randperm(len(data), generator=generator("scored samples", 0))
            data = data[order[: data.scored].sort().values.to(data.targets.device)]
        return super().evaluate(model, data)

    def subsample(self, model: nn.Module, data: Photographs, count: int, seed: int) -> tuple[Any, int]:
        """Decode the samples once, as every product passes over them: 1.2 GB for 8,192 samples of 224 pixels."""
        batches, number = super().subsample(model, data, count, seed)
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
