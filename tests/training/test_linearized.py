import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

from samlite.training.linearized import Linearized


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def test_it_is_the_network_and_its_jacobian_at_the_first_weights(float64: None) -> None:
    model, inputs = network(), torch.randn(5, 4)
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    expansion = Linearized(model)
    torch.testing.assert_close(expansion(inputs), model(inputs), rtol=1e-12, atol=0)
    step = {name: torch.randn_like(value) for name, value in first.items()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p += step[name]
    jacobian = jacrev(lambda at: functional_call(model, at, (inputs,)))(first)
    slope = sum(jacobian[name].flatten(2) @ step[name].flatten() for name in first)
    expected = functional_call(model, first, (inputs,)) + slope
    torch.testing.assert_close(expansion(inputs), expected, rtol=1e-12, atol=1e-12)


def test_squared_error_is_a_quadratic_of_its_weights(float64: None) -> None:
    pytest.importorskip("samlite._C")
    from samlite import Hessian

    expansion, data = Linearized(network()), (torch.randn(9, 4), torch.randn(9, 2))
    before = Hessian(expansion, nn.MSELoss(), data) @ torch.eye(44)
    with torch.no_grad():
        for p in expansion.parameters():
            p += torch.randn_like(p)
    torch.testing.assert_close(Hessian(expansion, nn.MSELoss(), data) @ torch.eye(44), before, rtol=1e-9, atol=1e-11)


def test_its_weights_are_those_of_the_network_and_the_state_keeps_the_origin(float64: None) -> None:
    model = Linearized(network())
    assert [p.numel() for p in model.parameters()] == [24, 6, 12, 2]
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    other, inputs = Linearized(network()), torch.randn(3, 4)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(inputs), model(inputs))


def test_batch_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="linearize must go with a network without batch norm"):
        Linearized(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
