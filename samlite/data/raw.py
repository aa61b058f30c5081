"""Images in the files that torchvision leaves in its folders, read without torchvision and without running anything.

train-images-idx3-ubyte, t10k-...      MNIST, FashionMNIST, KMNIST: IDX files, gzipped or not
cifar-10-batches-py/data_batch_1 ...   pickles of arrays
cifar-100-python/train, test           the same, labelled by their fine classes
"""

from __future__ import annotations

import gzip
import math
import pickle
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samlite.data.tensors import TensorData
from samlite.errors import UsageError
from samlite.files import regular

_PARTS = {"train": "train", "test": "t10k"}
_TEN = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
_HUNDRED = {"train": ["train"], "test": ["test"]}
_UBYTE = 8  # the code of unsigned bytes in an IDX file
# What pickles of numpy arrays are made of.
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


def read(source: str | None, size: int, channels: int) -> tuple[TensorData, TensorData, int] | None:
    """(Training images, test images, the number of classes) in a folder of torchvision's; None where it is none.

    Images are bytes (n, channels, size, size).

    Raises:
        UsageError: a file is missing, damaged, or of images of another size; the line names it.
    """
    if source is None or not Path(source).is_dir():
        return None
    folder = Path(source)
    if idx := _idx_folder(folder):
        parts = [_idx(idx, prefix) for prefix in _PARTS.values()]
        classes = 10
    elif batches := _existing(folder, "cifar-10-batches-py", "data_batch_1"):
        parts = [_pickled([batches / name for name in _TEN[part]], b"labels") for part in _PARTS]
        classes = 10
    elif batches := _existing(folder, "cifar-100-python", "train"):
        parts = [_pickled([batches / name for name in _HUNDRED[part]], b"fine_labels") for part in _PARTS]
        classes = 100
    else:
        return None
    for images, labels in parts:
        if images.shape[1:] != (channels, size, size):
            got = " by ".join(map(str, images.shape[1:]))
            raise UsageError(f"{folder}: images must be {channels} by {size} by {size}, got {got}")
        if len(images) != len(labels) or not len(images):
            raise UsageError(f"{folder}: there must be one label an image, got {len(images)} and {len(labels)}")
        if int(labels.max()) >= classes or int(labels.min()) < 0:
            raise UsageError(f"{folder}: a label must be one of 0 ... {classes - 1}, got {int(labels.max())}")
    train, test = (TensorData(images, labels) for images, labels in parts)
    return train, test, classes


def _existing(folder: Path, name: str, file: str) -> Path | None:
    """The folder of this name, here or inside, that holds the file."""
    return next((place for place in (folder, folder / name) if (place / file).is_file()), None)


# --- IDX


def _idx_folder(folder: Path) -> Path | None:
    """Where the IDX files are: here, in raw/, or in NAME/raw/ as torchvision puts them."""
    places = [folder, folder / "raw", *sorted(folder.glob("*/raw"))]
    found = [place for place in places if _idx_file(place, "train", "images-idx3")]
    if len(found) > 1:
        names = ", ".join(str(place.relative_to(folder)) for place in found)
        raise UsageError(f"{folder} must hold one data set, got {names}; name one of them")
    return found[0] if found else None


def _idx_file(folder: Path, part: str, kind: str) -> Path | None:
    names = [f"{part}-{kind}-ubyte", f"{part}-{kind.replace('-idx', '.idx')}-ubyte"]
    return next(
        (folder / (name + end) for name in names for end in ("", ".gz") if (folder / (name + end)).exists()), None
    )


def _idx(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """(Images (n, 1, height, width), labels (n,))."""
    arrays = []
    for kind, dims in (("images-idx3", 3), ("labels-idx1", 1)):
        path = _idx_file(folder, part, kind)
        if path is None:
            raise UsageError(f"{folder} must hold {part}-{kind}-ubyte, gzipped or not, got none")
        arrays.append(_array(path, dims))
    images, labels = arrays
    return images[:, None], labels.long()


def _array(path: Path, dims: int) -> Tensor:
    """The array of unsigned bytes in an IDX file."""
    content = regular(path).read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise UsageError(f"{path} must be a gzip file, but it is damaged: {error}") from None
    start = 4 + 4 * dims
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    if content[:4] != bytes([0, 0, _UBYTE, dims]) or len(content) != start + math.prod(shape):
        raise UsageError(f"{path} must be an IDX file of bytes in {dims} dimensions, but it is another one, or damaged")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())


# --- Pickles of CIFAR


class _Arrays(pickle.Unpickler):
    """Makes arrays and plain values, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, and only arrays are read")
        return super().find_class(module, name)


def _pickled(paths: Sequence[Path], labels: bytes) -> tuple[Tensor, Tensor]:
    """(Images (n, 3, 32, 32), labels (n,)) of some batches."""
    images, numbers = [], []
    for path in paths:
        try:
            with open(regular(path), "rb") as file:
                batch = _Arrays(file, encoding="bytes").load()
            data, found = np.asarray(batch[b"data"]), np.asarray(batch[labels])
            if data.dtype != np.uint8 or found.dtype.kind not in "iu":
                raise ValueError(f"its data are {data.dtype}, its labels {found.dtype}")
            images.append(torch.from_numpy(data.reshape(-1, 3, 32, 32).copy()))
            numbers.append(torch.from_numpy(found.astype(np.int64)))
        except Exception as error:  # damage shows as many kinds of error
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UsageError(f"{path} must be a batch of CIFAR's images, but it cannot be read: {reason}") from None
    return torch.cat(images), torch.cat(numbers)
