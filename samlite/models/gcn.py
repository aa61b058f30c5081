"""A graph convolution network (after Kipf and Welling 2017) for small graphs in padded dense batches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Categories of each feature of an atom. A value beyond the last counts as the last; 0 of the first is padding.
FEATURES = {
    "atomic number": 120,  # from 1; 119 is an atom of no element, such as *
    "chirality": 4,
    "degree": 12,
    "charge": 12,  # -5 ... 6
    "hydrogens": 10,
    "radical electrons": 6,
    "hybridisation": 9,
    "aromatic": 2,
    "ring": 2,
}
BONDS = 5  # kinds of bonds: single, double, triple, aromatic, any other; 0 is no bond
LAYERS = 5  # atoms see each other across five bonds: the depth of the benchmark's own baselines


class GraphConvolution(nn.Module):
    """x + dropout(relu(norm(W [x, mean of the neighbours' x, share of each kind of bond]))), an atom at a time."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * width + BONDS, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, neighbours: Tensor, bonds: Tensor) -> Tensor:
        seen = torch.cat([x, neighbours @ x, bonds], -1)
        residual: Tensor = self.dropout(torch.relu(self.norm(self.linear(seen))))
        return x + residual


class GraphNetwork(nn.Module):
    """Graphs (categories (B, N, 9), kinds of bonds (B, N, N)) -> outputs (B, outputs); 0 is no atom, no bond.

    Atoms of no kind are left out of every mean, so they have no influence on the others.
    """

    def __init__(self, width: int, outputs: int, dropout: float) -> None:
        super().__init__()
        tables = [nn.Embedding(size, width) for size in FEATURES.values()]
        for table in tables:
            nn.init.normal_(table.weight, std=len(FEATURES) ** -0.5)  # their sum has variance 1
        self.features = nn.ModuleList(tables)
        self.layers = nn.ModuleList(GraphConvolution(width, dropout) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)

    def forward(self, graphs: tuple[Tensor, Tensor]) -> Tensor:
        categories, kinds = graphs
        x = sum(table(categories[..., i].int()) for i, table in enumerate(self.features))
        bonds = F.one_hot(kinds.long(), BONDS + 1)[..., 1:].sum(2).to(x.dtype)  # (B, N, kinds): how many of each
        degree = bonds.sum(-1, keepdim=True).clamp(min=1)
        neighbours, bonds = (kinds > 0).to(x.dtype) / degree, bonds / degree
        for layer in self.layers:
            x = layer(x, neighbours, bonds)
        real = (categories[..., :1] > 0).to(x.dtype)
        pooled = (self.norm(x) * real).sum(1) / real.sum(1)
        outputs: Tensor = self.head(pooled)
        return outputs


def graph_network(width: int, outputs: int = 128, dropout: float = 0.0) -> GraphNetwork:
    """Five graph convolutions: 10 width² + (226 + outputs) width parameters and a few."""
    return GraphNetwork(width, outputs, dropout)
