"""Molecules in bioassays: ogbg-molpcba (Hu et al. 2020), or any table of SMILES and binary labels."""

from __future__ import annotations

import csv
import gzip
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samlite.data.graphs import LARGEST, Graph, GraphData, canonical, graph, molecule, scaffold, scaffold_split, silent
from samlite.data.tensors import Splits
from samlite.errors import UsageError, missing
from samlite.files import regular
from samlite.models import graph_network
from samlite.tasks.metrics import Ranking
from samlite.tasks.task import Recipe, Task

IDENTIFIERS = ("", "id", "index", "mol_id", "name")  # columns that are no labels
LABELS = {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0, "": float("nan"), "nan": float("nan")}
PARTS = {"train": "train", "validation": "valid", "test": "test"}  # of a split, and their files at OGB


class MaskedBinaryCrossEntropy(nn.Module):
    """The mean over the labels that are known, outputs being log-odds; 0 where none is known."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        known = ~targets.isnan()
        losses = F.binary_cross_entropy_with_logits(
            outputs, targets.where(known, 0).to(outputs.dtype), reduction="none"
        )
        return (losses * known).sum() / known.sum().clamp(min=1)

    def denominator(self, targets: Tensor) -> Tensor:
        return (~targets.isnan()).sum()


def load(source: str | None, seed: int) -> Splits:
    """Graphs with labels 0, 1 or nan; the same splits for every seed, each sorted by size.

    source is the folder that OGB unpacks, with its own scaffold split, or a csv or csv.gz file: its column smiles and,
    beside identifiers, a column a label. Rows of a file that are the same molecule become one, with the labels of all;
    where they contradict each other, that label is missing. Then it is split by scaffolds.

    A core reads about 2,400 molecules of 25 atoms with 128 labels a second, so ogbg-molpcba takes 3 minutes. Memory
    grows with atoms, bonds and labels: 0.9 kB such a molecule, and 5 times that while they are read.

    Raises UsageError that names the file and row of bad data; rows are counted from 1, below the header.
    """
    try:
        import rdkit  # noqa: F401
        import sklearn  # noqa: F401  (scores the outputs)
    except ImportError as error:
        raise missing("task molpcba", str(error.name), "graphs") from error
    path = Path(str(source))
    with silent():
        if path.is_dir():
            rows, data = _benchmark(path)
        elif path.exists():
            rows, data = _table(path)
        else:
            raise UsageError(
                f"cannot load molecules from {source!r}: no such folder or file; give the folder that OGB unpacks "
                "(https://ogb.stanford.edu/docs/graphprop, with mapping/mol.csv.gz in it), or a csv file"
            )
    parts = {name: data[_by_size(data, rows[name])] for name in PARTS}
    for name, part in parts.items():
        positive, negative = (part.targets == 1).any(0), (part.targets == 0).any(0)
        if len(part) and not (positive & negative).any():
            raise UsageError(f"{path}: the {name} split must hold a label with both 0 and 1, or nothing can be ranked")
    return Splits(**parts, sizes={"outputs": data.targets.shape[1]})


def _by_size(data: GraphData, rows: list[int]) -> Tensor:
    """These rows, small graphs first: unshuffled batches then need little padding."""
    chosen = torch.tensor(rows, dtype=torch.int64)
    return chosen[data.sizes[chosen].argsort(stable=True)]


def _benchmark(folder: Path) -> tuple[dict[str, list[int]], GraphData]:
    """OGB's layout: molecules without duplicates, and the rows of each part of the split."""
    table = _Table(folder / "mapping" / "mol.csv.gz")
    graphs = list(map(graph, table.molecules()))
    rows = {name: _split(folder / "split" / "scaffold" / f"{file}.csv.gz", len(graphs)) for name, file in PARTS.items()}
    return rows, GraphData.of(graphs, table.targets())


def _split(path: Path, count: int) -> list[int]:
    rows = []
    for number, row in enumerate(_rows(path), 1):
        index = int(row[0]) if len(row) == 1 and row[0].isdecimal() else -1
        if not 0 <= index < count:
            raise UsageError(f"{path}, row {number}: must be one of 0 ... {count - 1}, got {','.join(row)!r}")
        rows.append(index)
    return rows


def _table(path: Path) -> tuple[dict[str, list[int]], GraphData]:
    """A single table: duplicates merged, split by scaffolds."""
    table, places = _Table(path), dict[str, int]()
    graphs: list[Graph] = []
    scaffolds, owners = [], []
    for one in table.molecules():
        name = canonical(one)
        if name not in places:
            places[name] = len(graphs)
            graphs.append(graph(one))
            scaffolds.append(scaffold(one))
        owners.append(places[name])
    targets = _merge_labels(table.targets(), torch.tensor(owners), len(graphs))
    return dict(zip(PARTS, scaffold_split(scaffolds), strict=True)), GraphData.of(graphs, targets)


def _merge_labels(targets: Tensor, owners: Tensor, count: int) -> Tensor:
    """The labels of several rows as one: what those that know it agree on, nan where they do not."""
    zeros, ones = (
        torch.zeros(count, targets.shape[1]).index_add_(0, owners, (targets == value).float()) > 0 for value in (0, 1)
    )
    return ones.float().where(zeros != ones, torch.nan)


class _Table:
    """The rows of a csv file, read once: the molecules one by one, then their labels."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows = _rows(path)
        self._header = next(self._rows)
        if "smiles" not in self._header:
            raise UsageError(f"{path}: no column 'smiles', only {', '.join(map(repr, self._header[:8]))}")
        self._smiles = self._header.index("smiles")
        self._columns = [
            i for i, name in enumerate(self._header) if i != self._smiles and name.lower() not in IDENTIFIERS
        ]
        if not self._columns:
            raise UsageError(f"{path}: no column of labels beside {', '.join(map(repr, self._header))}")
        self._labels = array("f")

    def molecules(self) -> Iterator[Any]:
        """The molecule of each row."""
        for number, row in enumerate(self._rows, 1):
            place = f"{self.path}, row {number}"
            if len(row) != len(self._header):
                raise UsageError(f"{place}: must have {len(self._header)} values, got {len(row)}")
            self._labels.extend(self._known(row, place))
            yield _molecule(row[self._smiles], place)
        if not self._labels:
            raise UsageError(f"{self.path}: no rows")

    def _known(self, row: list[str], place: str) -> list[float]:
        try:
            return [LABELS[row[i]] for i in self._columns]
        except KeyError as error:
            column = next(self._header[i] for i in self._columns if row[i] not in LABELS)
            raise UsageError(f"{place}, column {column!r}: a label must be 0, 1 or empty, got {error}") from None

    def targets(self) -> Tensor:
        """(rows, labels)."""
        return torch.frombuffer(self._labels, dtype=torch.float32).view(-1, len(self._columns))


def _molecule(smiles: str, place: str) -> Any:
    result = molecule(smiles)
    if result is None:
        raise UsageError(f"{place}: not a valid SMILES: {smiles!r}")
    if result.GetNumAtoms() > LARGEST:
        raise UsageError(f"{place}: a molecule must have at most {LARGEST} atoms, got {result.GetNumAtoms()}")
    return result


def _rows(path: Path) -> Iterator[list[str]]:
    """The rows of a csv file, compressed or not, as text; blank lines do not count."""
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(regular(path), "rt", encoding="utf-8-sig", newline="") as file:
            any_rows = False
            for row in csv.reader(file):
                if row:
                    any_rows = True
                    yield row
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} is not a readable csv file: {str(error) or type(error).__name__}") from error
    if not any_rows:
        raise UsageError(f"{path}: no rows")


TASK = Task(
    name="molpcba",
    summary="molecules in bioassays, many binary labels with gaps",
    network="GCN of 5 layers [w]",
    data="ogbg-molpcba, the folder that OGB unpacks: 350,343 training, 43,793 validation, 43,793 test molecules "
    "with 128 labels; or a csv of SMILES and labels, split by scaffolds",
    model=graph_network,
    load=load,
    loss=MaskedBinaryCrossEntropy(),
    metric="average_precision",
    meter=Ranking,
    classes=2,
    # Of 6 recipes (lr 1e-3 ... 3e-3, batches of 32 and 64, dropout 0.2 ... 0.5, weight decay 0 and 1e-4; 20 epochs, one
    # seed) within noise the best average precision on the validation split of Tox21.
    recipe=Recipe(
        lr={"sgd": 0.1, "adam": 3e-3, "adamw": 3e-3},
        batch_size=64,
        epochs=30,
        dropout=0.3,
        schedule="cosine",
    ),
    width=192,
    widths=(128, 192, 256, 384, 500),
    extra="graphs",
    source="ogbg-molpcba",
    base="adam",
    chunk=256,
)
