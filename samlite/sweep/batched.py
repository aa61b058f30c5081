"""The cells of a sweep trained in batches, in this process."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from samlite.sweep.run import record
from samlite.training.batched import train_batched as train
from samlite.training.config import Config
from samlite.training.session import EpochRecord


def train_batched(folder: Path | str, cells: Sequence[Config]) -> Iterator[tuple[Config, EpochRecord | str]]:
    """Train the cells, those that differ by seed, labels, optimizer and radius together; see `training.batched`.

    Yields (cell, record) an epoch, or (cell, why it failed): the others go on. The cells join the folder's sweep.json.

    Raises:
        UsageError: a cell cannot be a member of a batch; the folder holds something else.
    """
    folder = Path(folder)
    record(folder, cells)
    alike: dict[Config, list[Config]] = {}
    for cell in cells:
        plain = replace(cell, seed=0, label_noise=0.0, rho=0.0, normalize=True, optimizer=cell.base)
        alike.setdefault(plain, []).append(cell)
    for together in alike.values():
        yield from train(together, folder)
