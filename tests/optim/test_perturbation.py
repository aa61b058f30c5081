import pytest
import torch
from torch import Tensor

from samlite.optim.perturbation import Snapshot, climb_, gradients_of


def group(*weights: Tensor, **options: object) -> dict[str, object]:
    return {"params": list(weights), "rho": 0.5, "adaptive": False, "normalize": True, **options}


def weight(values: list[float], gradient: list[float] | None) -> Tensor:
    result = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    if gradient is not None:
        result.grad = torch.tensor(gradient, dtype=torch.float64)
    return result


def test_weights_climb_along_the_gradient_of_all_groups_by_the_radius() -> None:
    first, second = weight([1.0, 2.0], [3.0, 0.0]), weight([5.0], [4.0])
    with torch.no_grad():
        norm = climb_(gradients_of([group(first), group(second, rho=1.0)]))
    assert norm == 5
    assert first.tolist() == [1 + 0.5 * 3 / 5, 2.0] and second.tolist() == [5 + 4 / 5]


def test_an_adaptive_perturbation_is_that_of_the_scaled_weights() -> None:
    w = weight([2.0, -1.0], [3.0, 8.0])
    with torch.no_grad():
        norm = climb_(gradients_of([group(w, adaptive=True)]))
    assert norm == 10  # |w| g = (6, 8)
    assert w.tolist() == pytest.approx([2 + 0.5 * 4 * 3 / 10, -1 + 0.5 * 1 * 8 / 10])


def test_without_normalisation_epsilon_is_the_radius_times_the_gradient() -> None:
    w = weight([1.0], [4.0])
    with torch.no_grad():
        climb_(gradients_of([group(w, normalize=False)]))
    assert w.tolist() == [3.0]


def test_weights_without_a_gradient_are_left_out_and_a_zero_gradient_moves_nothing() -> None:
    still, zero = weight([1.0], None), weight([2.0], [0.0])
    with torch.no_grad():
        assert climb_(gradients_of([group(still, zero)])) == 0
    assert still.tolist() == [1.0] and zero.tolist() == [2.0]


def test_a_snapshot_puts_weights_back_to_the_bit_and_only_once() -> None:
    w = torch.tensor([1e-8, 1.0, 1e8])
    before, snapshot = w.clone(), Snapshot()
    snapshot.take([[w]])
    assert snapshot.taken
    w.add_(0.1)
    snapshot.put_back()
    assert torch.equal(w, before) and not snapshot.taken
    w.add_(1)
    snapshot.put_back()
    assert not torch.equal(w, before)


def test_sparse_gradients_are_refused() -> None:
    w = torch.zeros(3, 2, requires_grad=True)
    w.grad = torch.zeros(3, 2).to_sparse()
    with pytest.raises(ValueError, match="gradients must be dense, got torch.sparse_coo; use sparse=False"):
        gradients_of([group(w)])
