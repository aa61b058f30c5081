"""A small vision transformer on CIFAR-10, with its regularisation or without.

The recipe regularises by weight decay, dropout and augmentation. Without it the network fits the training set:

    samlite train vit --weight-decay 0 --dropout 0 --no-augment
"""

from functools import partial

from torch import nn

from samlite.models import vit
from samlite.tasks.cifar10 import MEAN, STD
from samlite.tasks.images import crop_and_flip, load_in_memory
from samlite.tasks.task import Accuracy, Recipe, Splits, Task


def load(source: str | None, seed: int) -> Splits:
    """As of cifar10."""
    return load_in_memory(source, "vit", size=32, mode="RGB", classes=10, columns=("img", "image"))


TASK = Task(
    name="vit",
    summary="32×32 photographs of 10 kinds, by a transformer",
    network="ViT of 6 blocks with 4 heads, w numbers a token",
    data="CIFAR-10 from the hub or a folder of parquet files: 45,000 training, 5,000 validation, 10,000 test",
    model=partial(vit, size=32, mean=MEAN, std=STD, outputs=10),
    load=load,
    loss=nn.CrossEntropyLoss(),
    metric="accuracy",
    meter=Accuracy,
    base="adamw",
    classes=10,
    augment=crop_and_flip,
    recipe=Recipe(
        lr={"sgd": 0.1, "adam": 1e-3, "adamw": 1e-3},
        batch_size=128,
        epochs=200,
        weight_decay=0.1,
        dropout=0.1,
        schedule="cosine",
        threads=2,
    ),
    width=96,
    widths=(48, 96, 192, 384),
    extra="data",
    source="uoft-cs/cifar10",
    chunk=512,
)
