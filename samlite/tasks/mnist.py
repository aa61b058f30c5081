"""MNIST (LeCun, Cortes, Burges 1998), from the Hugging Face hub, parquet files, class folders or IDX files."""

from dataclasses import replace
from functools import partial

from torch import nn

from samlite.data.images import load_in_memory
from samlite.data.tensors import Splits, TensorData
from samlite.models import tapered_mlp
from samlite.tasks.metrics import Accuracy
from samlite.tasks.task import Classification, Recipe

MEAN, STD = 0.1307, 0.3081  # of the training pixels scaled to [0, 1]


def load(source: str | None, seed: int) -> Splits:
    """Images as normalised vectors (n, 784); the same split for every seed.

    source is a hub id or a folder that `datasets.load_dataset` reads, with the columns image and
    label in the splits train and test; or a folder of torchvision's for MNIST, FashionMNIST or KMNIST. Raises
    UsageError that names the column and row of bad data.
    """
    images = load_in_memory(source, "mnist", size=28, mode="L", classes=10)
    return Splits(_normalise(images.train), _normalise(images.validation), _normalise(images.test), images.sizes)


def _normalise(data: TensorData) -> TensorData:
    return replace(data, inputs=(data.inputs.flatten(1).float() / 255 - MEAN) / STD)


TASK = Classification(
    name="mnist",
    summary="28×28 images of digits",
    network="MLP [w, w/3]",
    data="MNIST from the hub, or a folder of parquet or IDX files: 54,000 training, 6,000 validation, 10,000 test",
    model=partial(tapered_mlp, 784, outputs=10),
    load=load,
    loss=nn.CrossEntropyLoss(),
    metric="accuracy",
    meter=Accuracy,
    extra="data",
    classes=10,
    recipe=Recipe(
        lr={"sgd": 0.1, "adam": 1e-3, "adamw": 1e-3},
        batch_size=128,
        epochs=100,
        weight_decay=1e-4,
        milestones=(0.25, 0.5, 0.75),
    ),
    width=300,
    widths=(150, 300, 1200, 3000),
    source="ylecun/mnist",
)
