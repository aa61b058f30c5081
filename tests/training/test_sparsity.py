import warnings
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from samlite import SAM, Hessian
from samlite.models import parameter_count
from samlite.training.sparsity import choose, mask, masks_in


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 10), nn.BatchNorm1d(10), nn.Linear(10, 3)
    )


def loss(model: nn.Module) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(16, 1, 8, generator=draw)
    return nn.functional.cross_entropy(model(inputs), torch.randint(0, 3, (16,), generator=draw))


def test_snip_scores_a_weight_by_its_product_with_its_gradient() -> None:
    # f = (a x + b y)^2 / 2 with a = 1, b = 10, x = 3, y = 0.1: |a df/da| = 4 * 3 * 1, |b df/db| = 4 * 0.1 * 10
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, 10.0]])
    kept = choose(nn.Sequential(layer), 0.5, "snip", lambda m: m(torch.tensor([[3.0, 0.1]])).square().sum() / 2, 0)
    assert kept["0"].tolist() == [[True, False]]
    kept = choose(nn.Sequential(layer), 0.5, "magnitude", loss, 0)
    assert kept["0"].tolist() == [[False, True]]


def test_random_masks_take_the_fraction_from_every_layer_and_the_others_from_all_together() -> None:
    model = network()
    total = 12 + 240 + 30
    layers = choose(model, 0.6, "random", loss, 0)
    assert {name: int(kept.sum()) for name, kept in layers.items()} == {"0": 5, "3": 96, "5": 12}
    for pruner in ("snip", "magnitude"):
        kept = choose(deepcopy(model), 0.6, pruner, loss, 0)
        assert sum(int(each.sum()) for each in kept.values()) == total - round(0.6 * total)
    scores = torch.cat([model[i].weight.detach().abs().flatten() for i in (0, 3, 5)])
    flat = torch.cat([each.flatten() for each in choose(model, 0.6, "magnitude", loss, 0).values()])
    assert scores[flat].min() >= scores[~flat].max()


def test_the_seed_decides_a_random_mask() -> None:
    first, same, other = (choose(network(), 0.5, "random", loss, seed)["3"] for seed in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_masks_hold_to_the_bit_through_training_and_a_state_dict(base: type[torch.optim.Optimizer]) -> None:
    model = network()
    kept = choose(deepcopy(model), 0.7, "random", loss, 0)
    before = {name: model.get_submodule(name).weight.detach().clone() for name in kept}
    mask(model, kept)
    assert parameter_count(model) == 282 - 8 - 168 - 21 + 4 + 10 + 20 + 3  # of 282 weights, and what is never masked
    for name, where in kept.items():
        assert torch.equal(model.get_submodule(name).weight, before[name] * where)

    optimizer = SAM(model.parameters(), base, rho=0.1, model=model, lr=0.1, weight_decay=0.1)

    def closure() -> Tensor:
        value = loss(model)
        value.backward()
        return value

    for _ in range(5):
        optimizer.step(closure)
    for name, where in kept.items():
        weight = model.get_submodule(name).weight
        assert not weight[~where].any() and (weight[where] != before[name][where]).all()

    again = mask(network(), masks_in(model.state_dict()))
    again.load_state_dict(model.state_dict())
    assert torch.equal(loss(again.eval()), loss(model.eval()))


def test_curvature_is_that_of_the_masked_subspace(float64: None) -> None:
    pytest.importorskip("samlite._C")
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    inputs, targets = torch.randn(12, 4), torch.randn(12, 2)
    kept = choose(model, 0.5, "random", loss, 0)
    mask(model, kept)
    weights = [p.detach().clone() for p in model.parameters()]

    def f(*values: Tensor) -> Tensor:
        named = dict(zip((name for name, _ in model.named_parameters()), values, strict=True))
        return nn.functional.mse_loss(torch.func.functional_call(model, named, (inputs,)), targets)

    blocks = torch.autograd.functional.hessian(f, tuple(weights))
    dense = torch.cat(
        [torch.cat([b.reshape(w.numel(), -1) for b in row], 1) for w, row in zip(weights, blocks, strict=True)]
    )
    hessian = Hessian(model, nn.MSELoss(), (inputs, targets))
    assert hessian.shape == (10 + 5 + 5 + 2,) * 2
    torch.testing.assert_close(hessian @ torch.eye(22), dense, rtol=1e-10, atol=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the moments take every sample by itself, and say so
        singles = [
            Hessian(model, nn.MSELoss(), (inputs[i : i + 1], targets[i : i + 1])) @ torch.eye(22) for i in range(12)
        ]
        second = torch.stack([h @ h for h in singles]).mean(0) - dense @ dense
        torch.testing.assert_close(hessian.moment_operator(2) @ torch.eye(22), second, rtol=1e-8, atol=1e-10)


def test_a_random_mask_does_not_follow_the_first_weights() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.Linear(100, 100)
    kept = layer.weight[choose(nn.Sequential(layer), 0.5, "random", loss, seed=0)["0"]]
    assert abs((kept > 0).double().mean() - 0.5) < 5 * 0.5 / len(kept) ** 0.5  # five standard errors
    assert abs(kept.mean() / layer.weight.std()) < 5 / len(kept) ** 0.5
