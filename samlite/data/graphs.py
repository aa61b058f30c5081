"""Molecules as graphs: read from SMILES by rdkit, stored without padding, padded a batch at a time.

The nine atom features are those of the Open Graph Benchmark (Hu et al. 2020), as category numbers of one vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samlite.models.gcn import BONDS, FEATURES

WINDOW = 16  # batches sorted by size together: on Tox21 an eighth of the padding of random batches

LARGEST = 1_000  # atoms of a molecule: a batch takes time and memory with the square of its largest

_CHARGE = 5  # what is added to a charge
_HIGHEST = [size - 1 for size in FEATURES.values()]


def molecule(smiles: str) -> Any:
    """What rdkit reads from a SMILES; None where it cannot, or where there is no atom.

    An atom may have more bonds than rdkit's table of valences allows: Tox21 has such compounds of aluminium.
    """
    from rdkit import Chem

    molecule = Chem.MolFromSmiles(smiles) or _parse_unchecked(smiles)
    return molecule if molecule is not None and molecule.GetNumAtoms() else None


def _parse_unchecked(smiles: str) -> Any:
    """Without the check of valences."""
    from rdkit import Chem

    molecule = Chem.MolFromSmiles(smiles, sanitize=False)
    if molecule is None:
        return None
    molecule.UpdatePropertyCache(strict=False)
    checks = Chem.SanitizeFlags.SANITIZE_ALL ^ Chem.SanitizeFlags.SANITIZE_PROPERTIES
    done = Chem.SanitizeMol(molecule, checks, catchErrors=True) == Chem.SanitizeFlags.SANITIZE_NONE
    return molecule if done else None


def canonical(molecule: Any) -> str:
    """The SMILES that is the same for every way to write the molecule."""
    from rdkit import Chem

    return str(Chem.MolToSmiles(molecule))


def scaffold(molecule: Any) -> str:
    """Rings and what links them (Bemis and Murcko 1996) as a SMILES; empty for a molecule without rings."""
    from rdkit.Chem.Scaffolds import MurckoScaffold

    return str(MurckoScaffold.MurckoScaffoldSmiles(mol=molecule, includeChirality=False))  # type: ignore[no-untyped-call]


@contextmanager
def silent() -> Iterator[None]:
    """No messages of rdkit on stderr: what is wrong is in the exception."""
    from rdkit import rdBase

    with rdBase.BlockLogs():
        yield


@dataclass(frozen=True)
class Graph:
    """A molecule."""

    atoms: np.ndarray[Any, np.dtype[np.uint8]]
    """Feature numbers (atoms, 9)."""
    bonds: np.ndarray[Any, np.dtype[np.int16]]
    """Bonds (bonds, 3): two atoms and the kind, each bond once."""


def graph(molecule: Any) -> Graph:
    """The graph of a molecule of rdkit with at most `LARGEST` atoms."""
    from rdkit import Chem

    kinds = {
        Chem.BondType.SINGLE: 1,
        Chem.BondType.DOUBLE: 2,
        Chem.BondType.TRIPLE: 3,
        Chem.BondType.AROMATIC: 4,
    }
    atoms = [
        (
            atom.GetAtomicNum() or 119,
            atom.GetChiralTag(),
            atom.GetTotalDegree(),
            max(atom.GetFormalCharge() + _CHARGE, 0),
            atom.GetTotalNumHs(),
            atom.GetNumRadicalElectrons(),
            atom.GetHybridization(),
            atom.GetIsAromatic(),
            atom.IsInRing(),
        )
        for atom in molecule.GetAtoms()
    ]
    bonds = [(b.GetBeginAtomIdx(), b.GetEndAtomIdx(), kinds.get(b.GetBondType(), BONDS)) for b in molecule.GetBonds()]
    return Graph(
        np.minimum(np.array(atoms, dtype=np.int16), _HIGHEST).astype(np.uint8),
        np.array(bonds, dtype=np.int16).reshape(-1, 3),
    )


@dataclass(frozen=True)
class GraphData:
    """Graphs one after the other, with their targets: about 9 bytes an atom, 6 a bond and 4 a target.

    Inputs of a batch are (atoms, bonds), padded to its largest graph: category numbers (B, N, 9), 0 where there is no
    atom, and symmetric kinds of bonds (B, N, N), 0 where there is none; both uint8.
    """

    atoms: Tensor
    """Feature numbers (atoms, 9), uint8."""
    bonds: Tensor
    """Bonds (bonds, 3), int16: two atoms, counted within their graph, and the kind."""
    atom_starts: Tensor
    """Offsets (n + 1): the atoms of graph i are atom_starts[i] ... atom_starts[i + 1] - 1."""
    bond_starts: Tensor
    """Offsets (n + 1), likewise."""
    targets: Tensor
    """Labels (n, labels): 0, 1, or nan where unknown."""

    @classmethod
    def of(cls, graphs: Iterable[Graph], targets: Tensor) -> GraphData:
        graphs = list(graphs)
        return cls(
            torch.from_numpy(np.concatenate([np.empty((0, len(FEATURES)), np.uint8), *(g.atoms for g in graphs)])),
            torch.from_numpy(np.concatenate([np.empty((0, 3), np.int16), *(g.bonds for g in graphs)])),
            _starts(torch.tensor([len(g.atoms) for g in graphs], dtype=torch.int64)),
            _starts(torch.tensor([len(g.bonds) for g in graphs], dtype=torch.int64)),
            targets,
        )

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def sizes(self) -> Tensor:
        """Atoms of each graph."""
        return self.atom_starts.diff()

    def __getitem__(self, rows: Tensor | slice) -> GraphData:
        if isinstance(rows, slice):
            rows = torch.arange(len(self))[rows]
        rows = rows.to(self.targets.device)
        atoms, atom_starts, _ = _gather(self.atoms, self.atom_starts, rows)
        bonds, bond_starts, _ = _gather(self.bonds, self.bond_starts, rows)
        return GraphData(atoms, bonds, atom_starts, bond_starts, self.targets[rows])

    def to(self, device: torch.device | str) -> GraphData:
        return replace(self, **{name: value.to(device) for name, value in vars(self).items()})

    def batches(self, batch_size: int, generator: torch.Generator | None = None) -> Iterator[tuple[Any, Tensor]]:
        """All graphs once; shuffled batches hold graphs of similar size."""
        if generator is None:
            groups = torch.split(torch.arange(len(self)), batch_size)
        else:
            groups = tuple(self._shuffle(batch_size, generator))
        for rows in groups:
            yield self.padded(rows.to(self.targets.device))

    def _shuffle(self, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Rows in random order, sorted by size within windows; the batches of a window come in random order."""
        sizes = self.sizes.cpu()
        for window in torch.split(torch.randperm(len(self), generator=generator), WINDOW * batch_size):
            groups = torch.split(window[sizes[window].argsort(stable=True)], batch_size)
            full = [rows for rows in groups if len(rows) == batch_size]
            yield from (full[i] for i in torch.randperm(len(full), generator=generator).tolist())
            yield from groups[len(full) :]

    def padded(self, rows: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """A batch of these graphs: ((atoms, bonds), targets)."""
        atoms, starts, sample = _gather(self.atoms, self.atom_starts, rows)
        count, size = len(rows), int(starts.diff().max())
        place = torch.arange(len(atoms), device=atoms.device) - starts[sample]
        categories = atoms.new_zeros(count, size, atoms.shape[1])
        categories[sample, place] = atoms

        bonds, _, sample = _gather(self.bonds, self.bond_starts, rows)
        first, second, kind = bonds.long().unbind(1)
        kinds = atoms.new_zeros(count, size, size)
        kinds[sample, first, second] = kinds[sample, second, first] = kind.to(kinds.dtype)
        return (categories, kinds), self.targets[rows]


def _starts(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _gather(values: Tensor, starts: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The values of these rows, where each begins now, and which of the rows each value belongs to."""
    counts = starts[rows + 1] - starts[rows]
    begins = _starts(counts)
    owner = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), counts)
    place = torch.arange(len(owner), device=rows.device) - begins[owner]
    return values[starts[rows][owner] + place], begins, owner


def scaffold_split(scaffolds: Iterable[str]) -> tuple[list[int], list[int], list[int]]:
    """Rows for training, validation and test, 80 : 10 : 10; molecules with the same scaffold stay together.

    The largest groups go to training, as far as they fit, the smallest to test: a model is tested on scaffolds it has
    not seen. Of equally large groups the one that appears first comes first.
    """
    groups: dict[str, list[int]] = {}
    for row, name in enumerate(scaffolds):
        groups.setdefault(name, []).append(row)
    n = sum(map(len, groups.values()))
    room = [round(0.8 * n), round(0.1 * n), n]
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    for group in sorted(groups.values(), key=len, reverse=True):  # a stable sort
        fitting = next(i for i in range(3) if len(group) <= room[i])
        parts[fitting].extend(group)
        room[fitting] -= len(group)
    return parts
