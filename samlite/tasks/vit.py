"""A small vision transformer on CIFAR-10, with its regularisation or without.

The recipe regularises by weight decay, dropout and augmentation. Without it the network fits the training set:

    samlite train vit --weight-decay 0 --dropout 0 --no-augment
"""

from dataclasses import replace
from functools import partial

from samlite.models import vit
from samlite.tasks import cifar10
from samlite.tasks.cifar10 import MEAN, STD
from samlite.tasks.task import Recipe

TASK = replace(
    cifar10.TASK,
    name="vit",
    summary="32×32 photographs of 10 kinds, by a transformer",
    network="ViT of 6 blocks with 4 heads, w numbers a token",
    model=partial(vit, size=32, mean=MEAN, std=STD, outputs=10),
    base="adamw",
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
)
