"""Linear stability against dense matrices, the closed form of linear regression, and what SAM really does."""

import math
import random
from typing import Any

import pytest
import torch
from models import WHOLE, prepared
from oracles import dense_gauss_newton, dense_hessians
from torch import Tensor, nn

from samlite import Hessian

CASES = [(0.05, 0.0), (0.05, 0.05), (0.4, 0.0), (0.3, 0.2)]  # learning rate, rho: stable and unstable


pytestmark = pytest.mark.usefixtures("float64")


def matrices(hessians: Tensor, rho: float) -> tuple[Tensor, Tensor]:
    steps = hessians + rho * hessians @ hessians
    return steps.mean(0), (steps @ steps).mean(0)


def by_hand(hessians: Tensor, lr: float, rho: float) -> tuple[float, float, float]:
    """(margin on the range of A, largest stable learning rate, value), by dense linear algebra."""
    a, b = matrices(hessians, rho)
    values, vectors = torch.linalg.eigh(a)
    inside = vectors[:, values > 1e-10 * values[-1]]
    margin = torch.linalg.eigvalsh(inside.T @ (lr * b - 2 * a) @ inside)[-1]
    half = inside / values[values > 1e-10 * values[-1]].sqrt()
    mu = torch.linalg.eigvalsh(half.T @ b @ half)[-1]
    value = torch.linalg.eigvalsh(torch.eye(len(a)) + lr * (lr * b - 2 * a))[-1]
    return float(margin), 2 / float(mu), float(value)


def regression(n: int, p: int) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A minimum of linear regression that interpolates, and its per-sample Hessians 2 x x^T."""
    model = nn.Linear(p, 1, bias=False)
    x = torch.randn(n, p)
    return model, x, model(x).detach(), 2 * x[:, :, None] * x[:, None, :]


@pytest.mark.parametrize(("lr", "rho"), CASES)
@pytest.mark.parametrize("shape", [(30, 6), (5, 12)], ids=["full rank", "overparameterised"])
def test_linear_regression_matches_its_formula(shape: tuple[int, int], lr: float, rho: float) -> None:
    model, x, y, hessians = regression(*shape)
    found = Hessian(model, nn.MSELoss(), (x, y)).stability(lr, rho, tol=1e-9)
    margin, max_lr, value = by_hand(hessians, lr, rho)
    scale = float(torch.linalg.eigvalsh(matrices(hessians, rho)[1])[-1])
    assert found.converged
    assert abs(found.margin - margin) <= 1e-8 * scale
    assert found.max_lr == pytest.approx(max_lr, rel=1e-8)
    assert found.value == pytest.approx(value, rel=1e-8)
    assert found.verdict == ("stable" if lr < max_lr else "unstable")


@pytest.mark.parametrize(("lr", "rho"), [(0.05, 0.0), (0.3, 0.2)])
@pytest.mark.parametrize("name", WHOLE)
def test_gauss_newton_stability_of_a_network_matches_dense_matrices(name: str, lr: float, rho: float) -> None:
    model, x, y = prepared(name)
    hessian = Hessian(model, nn.CrossEntropyLoss(), (x, y), curvature="ggn")
    hessians = dense_gauss_newton(model, x)
    margin, max_lr, value = by_hand(hessians, lr * 20, rho)
    found = hessian.stability(lr * 20, rho, tol=1e-9)
    assert found.max_lr == pytest.approx(max_lr, rel=1e-7)
    assert found.value == pytest.approx(value, rel=1e-8)
    assert abs(found.margin - margin) <= 1e-8 * float(torch.linalg.eigvalsh(hessians.mean(0))[-1])
    assert found.verdict == ("stable" if lr * 20 < max_lr else "unstable")


def test_the_form_in_powers_of_the_mean_is_the_same_matrix() -> None:
    model, x, y = prepared("MLP")
    hessians, lr, rho = dense_hessians(model, nn.CrossEntropyLoss(), x, y), 0.3, 0.05
    a, b = matrices(hessians, rho)
    mean, eye = hessians.mean(0), torch.eye(hessians.shape[1])
    base = eye - lr * mean - lr * rho * mean @ mean

    def spread(k: int) -> Tensor:
        return torch.linalg.matrix_power(hessians, k).mean(0) - torch.linalg.matrix_power(mean, k)

    form = base @ base + lr * (lr - 2 * rho) * spread(2) + 2 * lr**2 * rho * spread(3) + lr**2 * rho**2 * spread(4)
    assert torch.allclose(form, eye + lr * (lr * b - 2 * a), atol=1e-12)


def test_a_saddle_is_not_a_minimum() -> None:
    model, x, y = prepared("MLP")  # random weights
    found = Hessian(model, nn.CrossEntropyLoss(), (x, y)).stability(0.1)
    assert found.verdict == "not a minimum" and math.isnan(found.max_lr)


def test_no_curvature_is_stable_at_every_learning_rate() -> None:
    model = nn.Linear(3, 1)
    found = Hessian(model, lambda model, batch: model(batch[0]).mean(), [(torch.randn(4, 3),)]).stability(1.0)
    assert found.verdict == "stable" and found.max_lr == math.inf and found.value == 1


def test_bounds_of_the_paper_are_reported_with_their_slack() -> None:
    model, x, y, hessians = regression(30, 6)
    lr, rho = 0.3, 0.1
    found = Hessian(model, nn.MSELoss(), (x, y)).stability(lr, rho, tol=1e-9)
    mean = hessians.mean(0)
    a = float(torch.linalg.eigvalsh(mean)[-1])
    second = float(torch.linalg.eigvalsh((hessians @ hessians).mean(0) - mean @ mean)[-1])
    always, s_2, *rest = found.bounds.values()
    assert always.value == pytest.approx(a * (1 + rho * a)) and always.limit == pytest.approx(2 / lr)
    assert s_2.value == pytest.approx(second) and s_2.slack == pytest.approx(1 / (lr * (lr - 2 * rho)) - second)
    assert len(rest) == 2
    assert len(Hessian(model, nn.MSELoss(), (x, y)).stability(0.1, 0.1).bounds) == 1  # lr <= 2 rho implies no more


def threshold(hessians: Tensor, rho: float) -> float:
    """The learning rate at which the mean square of SAM begins to grow: the spectral radius of
    X -> mean (I - lr G_i) X (I - lr G_i) is 1, on the range."""
    steps = hessians + rho * hessians @ hessians
    values, vectors = torch.linalg.eigh(steps.mean(0))
    inside = vectors[:, values > 1e-10 * values[-1]]
    steps = inside.T @ steps @ inside
    eye = torch.eye(steps.shape[1])

    def radius(lr: float) -> float:
        factors = eye - lr * steps
        kron = torch.stack([torch.kron(f, f) for f in factors]).mean(0)
        return float(torch.linalg.eigvals(kron).abs().max())

    low, high = 0.0, 10.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if radius(middle) < 1 else (low, middle)
    return low


class Tiny(nn.Module):
    """Two layers without bias, 10 weights, that interpolate 4 samples."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 2, bias=False), nn.Linear(2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize("rho", [0.0, 0.02, 0.1])
def test_the_verdict_predicts_what_sam_does(rho: float) -> None:
    model, x = Tiny(), torch.randn(4, 4)
    y = model(x).detach()  # the weights interpolate
    hessian = Hessian(model, nn.MSELoss(), (x, y))
    hessians = dense_hessians(model, nn.MSELoss(), x, y)
    max_lr, exact = hessian.stability(0.1, rho, tol=1e-8).max_lr, threshold(hessians, rho)
    assert max_lr <= exact * (1 + 1e-6)  # a bound on every step is stricter than the mean over many
    below, above = 0.9 * max_lr, 1.3 * exact
    assert hessian.stability(below, rho).verdict == "stable"
    assert hessian.stability(above, rho).verdict == "unstable"
    assert distances(model, x, y, below, rho)[-1] <= 1
    assert distances(model, x, y, above, rho)[-1] > 10


def distances(model: nn.Module, x: Tensor, y: Tensor, lr: float, rho: float) -> list[float]:
    """Mean square error of the outputs over 2,000 runs of unnormalised single-sample SAM, relative to the start, every
    50 steps: the distance in the directions that have a slope. Samples are drawn at random."""
    runs, steps = 2000, 150
    generator = torch.Generator().manual_seed(3)
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor], inputs: Tensor, target: Tensor) -> Tensor:
        return (torch.func.functional_call(model, weights, (inputs[None],)) - target).square().mean()

    gradient = torch.func.vmap(torch.func.grad(loss))
    outputs = torch.func.vmap(lambda weights: torch.func.functional_call(model, weights, (x,)))
    weights = {name: p + 1e-7 * torch.randn(runs, *p.shape, generator=generator) for name, p in params.items()}
    far = [float((outputs(weights) - y).square().sum())]
    for step in range(1, steps + 1):
        i = torch.randint(0, len(x), (runs,), generator=generator)
        first = gradient(weights, x[i], y[i])
        second = gradient({name: w + rho * first[name] for name, w in weights.items()}, x[i], y[i])
        weights = {name: w - lr * second[name] for name, w in weights.items()}
        if step % 50 == 0:
            far.append(float((outputs(weights) - y).square().sum()))
    return [value / far[0] for value in far]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0,), "lr must be > 0, got 0.0"),
        ((0.1, -1.0), "rho must be >= 0, got -1.0"),
        ((0.1, 0.0, "epoch"), "unit must be 'sample' or 'batch', got 'epoch'"),
    ],
)
def test_bad_arguments_get_one_clear_line(arguments: Any, message: str) -> None:
    model, x, y, _ = regression(5, 3)
    with pytest.raises(ValueError, match=message):
        Hessian(model, nn.MSELoss(), (x, y)).stability(*arguments)


def test_a_rare_sample_of_large_curvature_decides_at_the_default_tolerance() -> None:
    x = torch.randn(2000, 20) * torch.logspace(0, -2, 20) * 0.3
    x[:, 0], x[:, -1], x[0] = 1, 0, 0
    x[0, -1] = 3**0.5  # far below the rest in the mean, but alone in its direction
    model = nn.Linear(20, 1, bias=False)
    hessian = Hessian(model, nn.MSELoss(), (x, model(x).detach()))
    hessians = 2 * x[:, :, None] * x[:, None, :]
    for lr in (0.3, 0.4):
        margin, max_lr, _ = by_hand(hessians, lr, 0.0)
        found = hessian.stability(lr)
        assert found.verdict == ("stable" if lr < max_lr else "unstable")
        assert abs(found.max_lr - max_lr) <= found.max_lr_error
        assert abs(found.margin - margin) <= found.error


@pytest.mark.parametrize(("dtype", "exponents"), [(torch.float64, [-548, -133, 332]), (torch.float32, [-60, 60])])
@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_stability_scales_with_the_loss(dtype: torch.dtype, exponents: list[int], rho: float) -> None:
    model, x, y, _ = regression(30, 6)
    model, x, y = model.to(dtype), x.to(dtype), y.to(dtype)

    def found(exponent: int, lr: float) -> Any:
        size = 2.0**exponent
        hessian = Hessian(model, lambda m, b: (m(b[0]) - b[1]).square().mean() * size, [(x, y)])
        result = hessian.stability(lr / size, rho / size)
        return result.verdict, torch.tensor([result.value, result.margin / size, result.max_lr * size])

    for lr in (0.05, 0.4):
        verdict, numbers = found(0, lr)
        for exponent in exponents:
            scaled = found(exponent, lr)
            assert scaled[0] == verdict
            assert torch.allclose(scaled[1], numbers, rtol=100 * torch.finfo(dtype).eps)


def small_problem(seed: int) -> tuple[nn.Module, Any, Tensor]:
    """Samples of one direction, equal ones, flat directions, one weight; and their Hessians in float64."""
    draw = random.Random(seed)
    n, p = draw.choice([1, 1, 2, 3, 6]), draw.choice([1, 2, 4, 7])
    x = torch.randn(n, p) * draw.choice([0.1, 1, 3])
    kind = draw.choice(["random", "one direction", "equal", "in pairs", "flat"])
    if kind == "one direction":
        x = torch.randn(n, 1) * x[:1]
    elif kind == "equal":
        x = x[:1].expand(n, p)
    elif kind == "in pairs":
        x = x[torch.arange(n) // 2]
    elif kind == "flat":
        x = x * (torch.arange(p) < max(1, p // 2))
    dtype = draw.choice([torch.float64, torch.float32])
    x = x.to(dtype)
    model = nn.Linear(p, 1, bias=False).to(dtype)
    wide = x.double()
    return model, (x, model(x).detach()), 2 * wide[:, :, None] * wide[:, None, :]


def check_small_problems(seeds: range) -> None:
    for seed in seeds:
        torch.manual_seed(seed)
        model, data, hessians = small_problem(seed)
        draw = random.Random(seed)
        rho, factor = draw.choice([0.0, 0.05, 0.3]), draw.choice([0.01, 0.1, 0.5, 0.95, 1.05, 2, 10])
        spread = torch.linalg.eigvalsh(matrices(hessians, rho)[0])
        inside = spread[spread > 1e-10 * spread[-1]]
        if inside[0] < 1e-3 * spread[-1]:  # float32 cannot tell such a direction from a flat one
            continue
        _, max_lr, _ = by_hand(hessians, 0.1, rho)
        margin, _, _ = by_hand(hessians, factor * max_lr, rho)
        hessian = Hessian(model, nn.MSELoss(), data, curvature=draw.choice(["ggn", "hessian"]))
        found = hessian.stability(factor * max_lr, rho)
        assert found.verdict == ("stable" if factor < 1 else "unstable"), seed
        assert abs(found.margin - margin) <= found.error + 1e-13 * float(spread[-1]), seed
        assert abs(found.max_lr - max_lr) <= found.max_lr_error + 1e-12 * max_lr, seed
        moments = hessian.moments(4)
        mean = hessians.mean(0)
        for k in (2, 3, 4):
            power = torch.linalg.matrix_power(hessians, k).mean(0)
            right = float(torch.linalg.eigvalsh(power - torch.linalg.matrix_power(mean, k))[-1])
            size = float(torch.linalg.matrix_norm(power, 2))
            assert abs(moments.powers[k] - right) <= moments.errors[k] + 1e-14 * size, seed
            assert moments.nonuniformity[k] == 0 or right > 1e-14 * size, seed


def test_small_problems_get_the_verdict_and_moments_of_dense_matrices() -> None:
    check_small_problems(range(40))


@pytest.mark.slow
def test_many_small_problems_get_the_verdict_and_moments_of_dense_matrices() -> None:
    check_small_problems(range(40, 1500))
