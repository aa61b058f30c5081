"""Batches of torch_geometric: a graph is a sample, with nodes and edges in numbers of its own."""

import warnings
from typing import Any

import pytest
import torch
from oracles import moment
from torch import Tensor, nn

from samlite import Hessian

gnn = pytest.importorskip("torch_geometric.nn")
data = pytest.importorskip("torch_geometric.data")

pytestmark = pytest.mark.usefixtures("float64")


class Net(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.out = first, second, nn.Linear(4, 3)

    def forward(self, d: Any) -> Tensor:
        x = torch.tanh(self.second(torch.tanh(self.first(d.x, d.edge_index)), d.edge_index))
        return self.out(gnn.global_mean_pool(x, d.batch, d.num_graphs))


def mlp(inputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 4), nn.Tanh(), nn.Linear(4, 4))


def graphs(count: int = 5) -> list[Any]:
    return [
        data.Data(x=torch.randn(3 + k, 3), edge_index=torch.randint(0, 3 + k, (2, 6 + k)), y=torch.tensor([k % 3]))
        for k in range(count)
    ]


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch), batch.y)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Net(gnn.GCNConv(3, 4), gnn.GCNConv(4, 4)),
        lambda: Net(gnn.GATConv(3, 4), gnn.GATConv(4, 4)),
        lambda: Net(gnn.GATv2Conv(3, 4), gnn.GATv2Conv(4, 4)),  # has parameters on edges with loops
        lambda: Net(gnn.GINConv(mlp(3)), gnn.GINConv(mlp(4))),
        lambda: Net(gnn.EdgeConv(mlp(6)), gnn.EdgeConv(mlp(8))),  # on edges
    ],
)
def test_moments_over_graphs_are_those_of_dense_hessians(make: Any) -> None:
    torch.manual_seed(0)
    model, each = make().double(), graphs()
    v = torch.randn(sum(p.numel() for p in model.parameters()))

    def dense(graph: Any) -> Tensor:
        single = Hessian(model, loss, [data.Batch.from_data_list([graph])])
        return single @ torch.eye(len(v))

    hessians = torch.stack([dense(graph) for graph in each])
    batches = [data.Batch.from_data_list(each[:2]), data.Batch.from_data_list(each[2:])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no fallback
        hessian = Hessian(model, loss, batches)
        for order in (2, 3):
            right = (moment(hessians, order) - torch.linalg.matrix_power(hessians.mean(0), order)) @ v
            assert (hessian.moment_operator(order) @ v - right).norm() <= 1e-10 * right.norm()
