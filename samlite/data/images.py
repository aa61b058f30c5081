"""Labelled images through `datasets`: a hub id, a folder of parquet files, or class folders SPLIT/CLASS/FILE.

Errors name the split, the column, the row and, where there is one, the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from samlite.data import hub, raw
from samlite.data.tensors import Splits, TensorData, hold_out
from samlite.errors import UsageError, missing
from samlite.files import regular

if TYPE_CHECKING:
    from PIL.Image import Image

PADDING = 4  # pixels on every side before a random crop


@dataclass(frozen=True)
class Table:
    """Rows of images, still encoded, with their labels."""

    rows: Any
    """The rows, a `datasets.Dataset`."""
    column: str
    """The column of the images."""
    place: str
    """Where the rows come from, for errors."""

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, row: int, mode: str) -> Image:
        """The image of a row in a mode of pillow, such as RGB. Raises UsageError with its place."""
        from PIL import Image

        encoded = self.rows[row][self.column]
        try:
            content = encoded["bytes"]
            stream = BytesIO(regular(Path(encoded["path"])).read_bytes() if content is None else content)
            return Image.open(stream).convert(mode)
        except Exception as error:  # a missing value, no image, or a broken one
            raise UsageError(f"{self.locate(row)}: not a readable image") from error

    def labels(self, classes: int) -> Tensor:
        """Class numbers (n,). Raises UsageError with the place of one that is none of 0 ... classes - 1."""
        labels = self.rows.data.column("label").to_pylist()
        for row, label in enumerate(labels):
            if not isinstance(label, int) or not 0 <= label < classes:
                place = f"{self.place}, column 'label', row {row}"
                raise UsageError(f"{place}: a label must be one of 0 ... {classes - 1}, got {label!r}")
        return torch.tensor(labels)

    def locate(self, row: int) -> str:
        """Where an image is."""
        encoded = self.rows[row][self.column] or {}
        file = "" if encoded.get("bytes") or not encoded.get("path") else f" ({encoded['path']})"
        return f"{self.place}, column {self.column!r}, row {row}{file}"


def tables(
    source: str | None, task: str, splits: Sequence[str], columns: Sequence[str] = ("image",)
) -> tuple[list[Table], int | None]:
    """The splits of these names, and how many classes the data say that there are; images in one of the columns.

    Raises:
        ImportError: `datasets` or pillow is missing.
        UsageError: the source cannot be read, or lacks a split, a column or rows.
    """
    read = _open(source, task, splits)
    result = [_table(read[name], f"{source}, split {name!r}", columns) for name in splits]
    return result, getattr(read[splits[0]].features["label"], "num_classes", None)


def decode(table: Table, size: int, mode: str, classes: int) -> TensorData:
    """All images of a table in memory, as bytes (n, channels, size, size). Raises UsageError with a place."""
    from PIL import Image

    labels = table.labels(classes)
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.empty((len(table), size, size, channels), dtype=np.uint8)
    for row in range(len(table)):
        image = table.image(row, mode)
        if image.size != (size, size):
            shape = f"{image.height} by {image.width}"
            raise UsageError(f"{table.locate(row)}: an image must be {size} by {size} pixels, got {shape}")
        pixels[row] = np.asarray(image).reshape(size, size, channels)
    return TensorData(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels)


def load_in_memory(
    source: str | None, task: str, *, size: int, mode: str, classes: int, columns: Sequence[str] = ("image",)
) -> Splits:
    """The splits train and test as bytes (n, channels, size, size); a tenth of train is held out for validation.

    From the hub, parquet files, class folders, or the files of torchvision's folders.
    """
    if found := raw.read(source, size, {"L": 1, "RGB": 3}[mode]):
        train, test, known = found
        return Splits(*hold_out(train), test, {} if known == classes else {"outputs": known})
    both, _ = tables(source, task, ("train", "test"), columns)
    train, test = (decode(table, size, mode, classes) for table in both)
    return Splits(*hold_out(train), test)


def crop_and_flip(images: Tensor, draw: torch.Generator) -> Tensor:
    """Each image (n, channels, height, width) shifted by up to 4 pixels, zeros entering, and half of them mirrored."""
    n, _, height, width = images.shape
    top, left = torch.randint(2 * PADDING + 1, (2, n, 1), generator=draw)
    mirrored = torch.rand(n, 1, generator=draw) < 0.5
    across = torch.arange(width)
    rows = (top + torch.arange(height)).to(images.device)
    columns = (left + torch.where(mirrored, across.flip(0), across)).to(images.device)
    padded = F.pad(images, [PADDING] * 4)
    each = torch.arange(n, device=images.device)[:, None, None]
    return padded[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _open(source: str | None, task: str, splits: Sequence[str]) -> Any:
    try:
        import PIL.Image  # noqa: F401  (decodes the images)
    except ImportError as error:
        raise missing(f"task {task}", "pillow", "data") from error
    return hub.load(source, task, "data", splits)


def _table(rows: Any, place: str, columns: Sequence[str]) -> Table:
    from datasets import Image

    column = next((name for name in columns if name in rows.column_names), None)
    if column is None or "label" not in rows.column_names:
        missing = "'label'" if column else " or ".join(map(repr, columns))
        raise UsageError(f"{place}: no column {missing}, only {', '.join(map(repr, rows.column_names))}")
    if not len(rows):
        raise UsageError(f"{place}: no rows")
    return Table(rows.cast_column(column, Image(decode=False)), column, place)
