import pytest
import torch
from torch import nn

from samlite.models import mlp, parameter_count, tapered_mlp


def test_an_mlp_alternates_linear_layers_and_relus_and_ends_linear() -> None:
    model = mlp(4, 3, 2)
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, nn.Linear]
    inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    first, last = model[0], model[2]
    hidden = (inputs @ first.weight.T + first.bias).clamp(min=0)
    torch.testing.assert_close(model(inputs), hidden @ last.weight.T + last.bias)


@pytest.mark.parametrize(("width", "second"), [(1, 1), (8, 3), (150, 50), (300, 100)])
def test_the_tapered_mlp_narrows_to_a_third_but_never_to_nothing(width: int, second: int) -> None:
    assert [layer.out_features for layer in tapered_mlp(64, width, 10)[::2]] == [width, second, 10]


def test_a_tied_parameter_counts_once_and_a_frozen_one_not_at_all() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    assert parameter_count(model) == 9 + 3 + 3
