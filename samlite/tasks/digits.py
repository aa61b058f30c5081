"""The offline example: the 8×8 handwritten digits that come with scikit-learn (UCI, 1998)."""

from functools import partial

import torch
from torch import nn

from samlite.data.tensors import Splits, TensorData, hold_out
from samlite.errors import missing
from samlite.models import tapered_mlp
from samlite.tasks.metrics import Accuracy
from samlite.tasks.task import Recipe, Task

TRAINING = 1000  # of 1,797; a larger training set leaves SAM nothing to improve


def load(source: str | None, seed: int) -> Splits:
    """Pixels scaled to [0, 1]; the same split for every seed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise missing("task digits", "scikit-learn", "demo") from error
    bunch = load_digits()
    digits = TensorData(
        torch.tensor(bunch.data, dtype=torch.float32) / 16, torch.tensor(bunch.target, dtype=torch.int64)
    )
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    train, validation = hold_out(digits[order[:TRAINING]])
    return Splits(train, validation, digits[order[TRAINING:]])


TASK = Task(
    name="digits",
    summary="8×8 images of digits, offline",
    network="MLP [w, w/3]",
    data="scikit-learn's digits: 900 training, 100 validation and 797 test images",
    model=partial(tapered_mlp, 64, outputs=10),
    load=load,
    loss=nn.CrossEntropyLoss(),
    metric="accuracy",
    meter=Accuracy,
    extra="demo",
    classes=10,
    # lr of SGD, then rho at that lr: the best of 0.02 .. 0.2 and of 0.01 .. 0.2 on validation, at width 64 over 5 seeds
    recipe=Recipe(lr={"sgd": 0.05, "adam": 1e-3, "adamw": 1e-3}, batch_size=32, epochs=100, rho=0.2),
    width=32,
    widths=(16, 64, 256),
)
