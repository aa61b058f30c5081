"""CIFAR-10 (Krizhevsky 2009), from the Hugging Face hub, parquet files, class folders or its own batches."""

from functools import partial

from torch import nn

from samlite.data.images import crop_and_flip, load_in_memory
from samlite.data.tensors import Splits
from samlite.models import resnet18
from samlite.tasks.metrics import Accuracy
from samlite.tasks.task import Classification, Recipe

# Of the training pixels scaled to [0, 1], a number a channel.
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def load(source: str | None, seed: int) -> Splits:
    """Images as bytes (n, 3, 32, 32), which the network normalises; the same split for every seed.

    source is a hub id or a folder that `datasets.load_dataset` reads, with the columns img (or image) and
    label in the splits train and test; or a folder of torchvision's for CIFAR-10, or CIFAR-100 with its 100 classes.
    Raises UsageError that names the column and row of bad data.
    """
    return load_in_memory(source, "cifar10", size=32, mode="RGB", classes=10, columns=("img", "image"))


TASK = Classification(
    name="cifar10",
    summary="32×32 photographs of 10 kinds",
    network="ResNet-18, w filters in the first stage",
    data="CIFAR-10 from the hub, or a folder of parquet files or of cifar-10-batches-py: 45,000 training, 5,000 "
    "validation, 10,000 test",
    model=partial(resnet18, mean=MEAN, std=STD, outputs=10),
    load=load,
    loss=nn.CrossEntropyLoss(),
    metric="accuracy",
    meter=Accuracy,
    classes=10,
    augment=crop_and_flip,
    recipe=Recipe(
        lr={"sgd": 0.1, "adam": 1e-3, "adamw": 1e-3},
        batch_size=128,
        epochs=200,
        weight_decay=5e-4,
        threads=2,
    ),
    width=16,
    widths=(4, 16, 64, 256),
    extra="data",
    source="uoft-cs/cifar10",
    chunk=512,
)
