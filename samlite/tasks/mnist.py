"""MNIST (LeCun, Cortes, Burges 1998), from the Hugging Face hub or a folder of parquet files."""

import logging
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from samlite.models import tapered_mlp
from samlite.tasks.task import Accuracy, Recipe, Splits, Task, TensorData, hold_out

MEAN, STD = 0.1307, 0.3081  # of the training pixels scaled to [0, 1]


def load(source: str | None, seed: int) -> Splits:
    """Images as normalised vectors (n, 784); the same split for every seed.

    source is a hub id or a folder that `datasets.load_dataset` reads, with the columns image and
    label in the splits train and test. Raises ValueError that names the column and row of bad data.
    """
    splits = _open(source)
    for name in ("train", "test"):
        if name not in splits:
            raise ValueError(f"{source} has no split {name!r}, only {', '.join(map(repr, splits))}")
    train, validation = hold_out(_decode(splits["train"], f"{source}, split 'train'"))
    return Splits(train, validation, _decode(splits["test"], f"{source}, split 'test'"))


def _open(source: str | None) -> Any:
    try:
        import datasets
        import PIL.Image  # noqa: F401  (decodes the images)
    except ImportError as error:
        raise ImportError("task mnist needs datasets and pillow: pip install 'samlite[data]'") from error
    datasets.disable_progress_bars()
    for name in ("datasets", "huggingface_hub"):  # what matters is in the exception
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        return datasets.load_dataset(source)
    except Exception as error:  # the hub, the file system and the parser each raise their own kinds
        reason = _broken_file(str(source)) or (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot load MNIST from {source!r}: {reason}") from error


def _broken_file(folder: str) -> str | None:
    from pyarrow import parquet  # type: ignore[import-untyped]

    for path in sorted(Path(folder).glob("**/*.parquet")):
        try:
            parquet.read_metadata(path)
        except Exception:
            return f"{path.name} is truncated or not a parquet file"
    return None


def _decode(table: Any, place: str) -> TensorData:
    from datasets import Image

    for column in ("image", "label"):
        if column not in table.column_names:
            raise ValueError(f"{place}: no column {column!r}, only {', '.join(map(repr, table.column_names))}")
    if not len(table):
        raise ValueError(f"{place}: no rows")
    encoded = table.cast_column("image", Image(decode=False))["image"]
    pixels = np.stack([_pixels(image, f"{place}, column 'image', row {i}") for i, image in enumerate(encoded)])
    labels = [_label(label, f"{place}, column 'label', row {i}") for i, label in enumerate(table["label"])]
    inputs = (torch.from_numpy(pixels).flatten(1).float() / 255 - MEAN) / STD
    return TensorData(inputs, torch.tensor(labels))


def _pixels(image: Any, place: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    from PIL import Image

    try:
        pixels = np.asarray(Image.open(BytesIO(image["bytes"])).convert("L"))
    except Exception as error:  # a missing value, no image, or a broken one
        raise ValueError(f"{place}: not a readable image") from error
    if pixels.shape != (28, 28):
        raise ValueError(f"{place}: an image must be 28 by 28 pixels, got {' by '.join(map(str, pixels.shape))}")
    return pixels


def _label(label: Any, place: str) -> int:
    if not isinstance(label, int) or not 0 <= label <= 9:
        raise ValueError(f"{place}: a label must be one of 0 ... 9, got {label!r}")
    return label


TASK = Task(
    name="mnist",
    summary="28×28 images of digits",
    network="MLP [w, w/3]",
    data="MNIST from the hub or a folder of parquet files: 54,000 training, 6,000 validation, 10,000 test",
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
