"""Every variant against its definition, written out by hand over flat vectors in float64."""

import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import Waits
from torch import Tensor, nn

from samlite import SAM, AgnosticSAM, FriendlySAM, SAMPa

pytestmark = pytest.mark.usefixtures("float64")

LR, RHO, STEPS = 0.1, 0.3, 6
Gradient = Callable[[Tensor, int], Tensor]  # of the weights and the number of the batch


class Problem:
    """A model with a loss for each batch, and its gradient as a function of the flat weights."""

    def __init__(self, model: nn.Module, losses: Callable[[nn.Module, int], Tensor]) -> None:
        self.model, self.losses = model, losses
        self.passes = 0

    def closure(self, batch: int) -> Callable[[], Tensor]:
        def run() -> Tensor:
            self.passes += 1
            loss = self.losses(self.model, batch)
            loss.backward()
            return loss

        return run

    @property
    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])

    def gradient(self, at: Tensor, batch: int) -> Tensor:
        shapes = [p.shape for p in self.model.parameters()]
        parts = [part.view(shape) for part, shape in zip(at.split([s.numel() for s in shapes]), shapes, strict=True)]
        named = dict(zip((name for name, _ in self.model.named_parameters()), parts, strict=True))
        named = {name: part.clone().requires_grad_() for name, part in named.items()}
        loss = self.losses(lambda x: torch.func.functional_call(self.model, named, (x,)), batch)  # type: ignore[arg-type]
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(named.values()))])


def quadratic() -> Problem:
    roots = torch.randn(40, 5, 5)
    model = nn.Linear(1, 5, bias=False)
    return Problem(model, lambda f, i: (roots[i] @ f(torch.ones(1, 1)).flatten() - i).square().sum() / 2)


def network() -> Problem:
    inputs, targets = torch.randn(40, 8, 4), torch.randint(0, 3, (40, 8))
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    return Problem(model, lambda f, i: nn.functional.cross_entropy(f(inputs[i]), targets[i]))


@pytest.fixture(params=[quadratic, network])
def problem(request: pytest.FixtureRequest) -> Iterator[Problem]:
    yield request.param()


def unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()


def close(problem: Problem, expected: Tensor) -> None:
    torch.testing.assert_close(problem.weights, expected, rtol=1e-10, atol=1e-12)


def test_friendly_sam_ascends_by_what_the_mean_gradient_does_not_explain(problem: Problem) -> None:
    optimizer = FriendlySAM(problem.model.parameters(), torch.optim.SGD, RHO, sigma=0.7, lmbda=0.6, lr=LR / 10)
    w, mean = problem.weights, None
    for i in range(STEPS):
        g = problem.gradient(w, i)
        d = g if mean is None else g - 0.7 * mean
        mean = g if mean is None else 0.6 * mean + 0.4 * g
        w = w - LR / 10 * problem.gradient(w + RHO * unit(d), i)
        optimizer.step(problem.closure(i))
        close(problem, w)
    assert problem.passes == 2 * STEPS


def test_agnostic_sam_ascends_on_training_and_descends_on_held_out_data(problem: Problem) -> None:
    optimizer = AgnosticSAM(problem.model.parameters(), torch.optim.SGD, RHO, rho_val=0.2, lr=LR / 10)
    w = problem.weights
    for i in range(STEPS):
        u = problem.gradient(w + 0.2 * unit(problem.gradient(w, 20 + i)), 20 + i)
        epsilon = RHO * unit(problem.gradient(w, i)) - 0.2 * unit(u)
        w = w - LR / 10 * problem.gradient(w + epsilon, i)
        optimizer.step(problem.closure(i), problem.closure(20 + i))
        close(problem, w)
    assert problem.passes == 4 * STEPS


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_sampa_takes_its_gradients_at_x_and_at_y(problem: Problem, momentum: float) -> None:
    lr, lmbda, decay = LR / 10, 0.3, 0.01
    optimizer = SAMPa(
        problem.model.parameters(), torch.optim.SGD, RHO, lmbda=lmbda, lr=lr, momentum=momentum, weight_decay=decay
    )
    x, buffer, ahead = problem.weights, None, problem.gradient(problem.weights, 0)

    def move(x: Tensor, buffer: Tensor | None, g: Tensor) -> tuple[Tensor, Tensor]:
        g = g + decay * x
        buffer = g if buffer is None else momentum * buffer + g
        return x - lr * buffer, buffer

    for i in range(STEPS):
        here = problem.gradient(x + RHO * unit(ahead), i)
        y, _ = move(x, buffer, ahead)
        ahead = problem.gradient(y, i + 1)
        x, buffer = move(x, buffer, (1 - lmbda) * here + lmbda * ahead)
        optimizer.step(problem.closure(i), problem.closure(i + 1))
        close(problem, x)
    assert problem.passes == 2 * STEPS + 1


def test_sampa_without_a_next_batch_counts_the_first_gradient_in_full(problem: Problem) -> None:
    optimizer = SAMPa(problem.model.parameters(), torch.optim.SGD, RHO, lr=LR / 10)
    x = problem.weights
    for i in range(2):
        x = x - LR / 10 * problem.gradient(x + RHO * unit(problem.gradient(x, i)), i)
        optimizer.step(problem.closure(i))
        close(problem, x)
    assert problem.passes == 4


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_m_sam_gives_each_m_closures_a_perturbation_of_their_own(problem: Problem, m: int) -> None:
    optimizer = SAM(problem.model.parameters(), torch.optim.SGD, RHO, m=m, lr=LR / 10)
    w = problem.weights
    for i in range(0, 4 * STEPS, 4):
        groups = [range(i, i + 4)[k : k + m] for k in range(0, 4, m)]
        total = torch.zeros_like(w)
        for group in groups:
            up = w + RHO * unit(sum(problem.gradient(w, j) for j in group) / len(group))  # type: ignore[arg-type]
            total += sum(problem.gradient(up, j) for j in group) / 4
        loss = sum(problem.losses(problem.model, j).item() for j in range(i, i + 4)) / 4
        w = w - LR / 10 * total
        assert optimizer.step([problem.closure(j) for j in range(i, i + 4)]).item() == pytest.approx(loss, rel=1e-12)
        close(problem, w)


def run(kind: type[SAM], steps: int = STEPS, **options: Any) -> Tensor:
    torch.manual_seed(1)
    problem = network()
    optimizer = kind(problem.model.parameters(), torch.optim.Adam, lr=LR, **options)
    for i in range(steps):
        if kind is AgnosticSAM:
            optimizer.step(problem.closure(i), problem.closure(30))  # type: ignore[call-arg]
        elif kind is SAMPa:
            optimizer.step(problem.closure(i), problem.closure(i + 1))  # type: ignore[call-arg]
        else:
            optimizer.step(problem.closure(i))
    return problem.weights


def test_degenerate_settings_reduce_to_what_they_should() -> None:
    sam, plain = run(SAM, rho=RHO), run(SAM, rho=0.0)
    assert torch.equal(run(FriendlySAM, rho=RHO, sigma=0.0), sam)
    assert torch.equal(run(AgnosticSAM, rho=RHO, rho_val=0.0), sam)
    assert torch.equal(run(SAM, rho=RHO, m=1), sam)  # one closure is the batch
    torch.testing.assert_close(run(SAMPa, rho=0.0, lmbda=0.0), plain, rtol=1e-12, atol=0)
    assert torch.equal(run(FriendlySAM, rho=0.0), plain)
    assert not torch.equal(run(FriendlySAM, rho=RHO), sam) and not torch.equal(run(AgnosticSAM, rho=RHO), sam)


@pytest.mark.parametrize("kind", [FriendlySAM, AgnosticSAM, SAMPa])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_a_variant_resumes_bit_for_bit(kind: type[SAM], base: type[torch.optim.Optimizer]) -> None:
    options: dict[str, Any] = {"momentum": 0.9} if base in (torch.optim.SGD, torch.optim.RMSprop) else {}

    def start() -> tuple[Problem, SAM]:
        torch.manual_seed(1)
        problem = network()
        return problem, kind(problem.model.parameters(), base, rho=RHO, lr=0.01, **options)

    def steps(problem: Problem, optimizer: SAM, numbers: range) -> None:
        for i in numbers:
            second = {SAMPa: i + 1, AgnosticSAM: 30}.get(kind)
            closures = [problem.closure(i), *([problem.closure(second)] if second is not None else [])]
            optimizer.step(*closures)

    whole, optimizer = start()
    steps(whole, optimizer, range(6))
    first, optimizer = start()
    steps(first, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": first.model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    second, optimizer = start()
    second.model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    steps(second, optimizer, range(3, 6))
    assert torch.equal(second.weights, whole.weights)


def test_batch_norm_sees_each_batch_once() -> None:
    inputs = torch.randn(12, 16, 3)
    for kind in (FriendlySAM, AgnosticSAM, SAMPa):
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        problem = Problem(model, lambda f, i: f(inputs[i]).pow(4).mean())
        optimizer = kind(model.parameters(), torch.optim.SGD, rho=0.1, model=model, lr=0.1)
        for i in range(3):
            second = [] if kind is FriendlySAM else [problem.closure(i + 1)]
            optimizer.step(problem.closure(i), *second)
        assert model[1].num_batches_tracked == 3


@pytest.mark.parametrize("kind", [FriendlySAM, AgnosticSAM, SAMPa])
def test_a_gradient_that_is_not_finite_skips_the_step_and_the_next_goes_on(kind: type[SAM]) -> None:
    problem = network()
    broken = Problem(problem.model, lambda f, i: problem.losses(f, i) * float("inf"))
    optimizer = kind(problem.model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, momentum=0.9)
    second = [] if kind is FriendlySAM else [problem.closure(30)]
    optimizer.step(problem.closure(0), *second)
    before = problem.weights
    optimizer.step(broken.closure(1), *second)
    assert torch.equal(problem.weights, before) and optimizer.skipped == 1
    optimizer.step(problem.closure(2), *second)
    assert problem.weights.isfinite().all() and not torch.equal(problem.weights, before)


@pytest.mark.parametrize("kind", [FriendlySAM, AgnosticSAM, SAMPa])
def test_a_pickled_variant_keeps_its_own_settings(kind: type[SAM]) -> None:
    own = {FriendlySAM: {"sigma": 0.5, "lmbda": 0.8}, AgnosticSAM: {"rho_val": 0.1}, SAMPa: {"lmbda": 0.4}}[kind]
    optimizer = kind([nn.Parameter(torch.ones(2))], torch.optim.SGD, lr=0.1, **own)
    again = pickle.loads(pickle.dumps(optimizer))
    assert {name: getattr(again, name) for name in own} == own


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (FriendlySAM, {"sigma": -1}, "sigma must be >= 0 and finite, got -1"),
        (FriendlySAM, {"lmbda": 1}, "lmbda must be >= 0 and < 1, got 1"),
        (FriendlySAM, {"m": 2}, "m must not be given to FriendlySAM, got 2; use SAM"),
        (AgnosticSAM, {"rho_val": -0.1}, "rho_val must be >= 0 and finite, got -0.1"),
        (AgnosticSAM, {"adaptive": True}, "adaptive must not be given to AgnosticSAM"),
        (SAMPa, {"lmbda": 2}, "lmbda must be between 0 and 1, got 2"),
        (SAM, {"m": 0}, "m must be the number of closures that share a perturbation, >= 1, got 0"),
    ],
)
def test_a_bad_setting_is_refused(kind: type[SAM], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind([nn.Parameter(torch.ones(2))], torch.optim.SGD, lr=0.1, **options)


def test_a_variant_without_its_second_closure_or_by_hand_is_refused() -> None:
    problem = network()
    agnostic = AgnosticSAM(problem.model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="closure must be a function that runs backward"):
        agnostic.step(problem.closure(0))
    with pytest.raises(RuntimeError, match="AgnosticSAM has no first_step"):
        agnostic.first_step()
    with pytest.raises(RuntimeError, match="SAMPa has no first_step"):
        SAMPa(problem.model.parameters(), torch.optim.SGD, lr=0.1).first_step()


# Clipping, gradient scaling and accumulation, for SAM and its variants


@pytest.mark.parametrize("rho", [0.0, RHO])
def test_the_final_gradient_is_clipped_and_the_perturbation_is_not(problem: Problem, rho: float) -> None:
    optimizer = SAM(problem.model.parameters(), torch.optim.SGD, rho, max_norm=0.05, lr=LR)
    w = problem.weights
    for i in range(STEPS):
        up = w + rho * unit(problem.gradient(w, i)) if rho else w
        g = problem.gradient(up, i)
        w = w - LR * g * min(1, 0.05 / float(g.norm()))
        optimizer.step(problem.closure(i))
        close(problem, w)


def scaled(
    problem: Problem, scaler: torch.amp.GradScaler, factor: float = 1.0
) -> Callable[[int], Callable[[], Tensor]]:
    def closure(batch: int) -> Callable[[], Tensor]:
        def run() -> Tensor:
            loss = problem.losses(problem.model, batch) * factor
            scaler.scale(loss).backward()
            return loss

        return run

    return closure


@pytest.mark.parametrize("kind", [SAM, FriendlySAM, AgnosticSAM, SAMPa])
def test_a_gradient_scaler_changes_nothing_but_the_scale(kind: type[SAM]) -> None:
    def second(closure: Callable[[int], Any], i: int) -> list[Any]:
        return {AgnosticSAM: [closure(30)], SAMPa: [closure(i + 1)]}.get(kind, [])

    torch.manual_seed(1)
    plain = network()
    optimizer = kind(plain.model.parameters(), torch.optim.Adam, RHO, lr=0.01, max_norm=0.1)
    for i in range(4):
        optimizer.step(plain.closure(i), *second(plain.closure, i))

    torch.manual_seed(1)
    problem = network()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    optimizer = kind(problem.model.parameters(), torch.optim.Adam, RHO, lr=0.01, max_norm=0.1, scaler=scaler)
    closure = scaled(problem, scaler)
    for i in range(4):
        optimizer.step(closure(i), *second(closure, i))
    torch.testing.assert_close(problem.weights, plain.weights, rtol=1e-9, atol=1e-12)
    assert scaler.get_scale() == 4096.0  # it grew twice: one update a step

    before = problem.weights
    broken = scaled(problem, scaler, float("inf"))
    optimizer.step(broken(4), *second(closure, 4))
    assert torch.equal(problem.weights, before) and optimizer.skipped == 1 and scaler.get_scale() == 2048.0
    optimizer.step(closure(5), *second(closure, 5))
    assert problem.weights.isfinite().all() and not torch.equal(problem.weights, before)


@pytest.mark.parametrize("kind", [SAM, FriendlySAM, AgnosticSAM, SAMPa])
def test_four_micro_batches_equal_one_batch(kind: type[SAM]) -> None:
    inputs, targets = torch.randn(12, 8, 4), torch.randint(0, 3, (12, 8))

    def weights(parts: int) -> Tensor:
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        optimizer = kind(model.parameters(), torch.optim.SGD, RHO, lr=LR, momentum=0.9)

        def closures(batch: int) -> list[Callable[[], Tensor]]:
            def closure(x: Tensor, y: Tensor) -> Callable[[], Tensor]:
                def run() -> Tensor:
                    loss = nn.functional.cross_entropy(model(x), y)
                    loss.backward()
                    return loss

                return run

            return [closure(x, y) for x, y in zip(inputs[batch].chunk(parts), targets[batch].chunk(parts), strict=True)]

        for i in range(STEPS):
            second = {AgnosticSAM: [closures(11)], SAMPa: [closures(i + 1)]}.get(kind, [])
            optimizer.step(closures(i), *second)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    torch.testing.assert_close(weights(4), weights(1), rtol=1e-12, atol=1e-14)


def test_parameter_groups_have_radii_of_their_own(problem: Problem) -> None:
    parameters = list(problem.model.parameters())
    groups: list[dict[str, Any]] = [{"params": parameters[:1], "rho": 0.5}, {"params": parameters[1:]}]
    optimizer = SAM([group for group in groups if group["params"]], torch.optim.SGD, rho=0.1, lr=LR / 10)
    radii = torch.cat([torch.full((p.numel(),), 0.5 if i == 0 else 0.1) for i, p in enumerate(parameters)])
    w = problem.weights
    for i in range(STEPS):
        w = w - LR / 10 * problem.gradient(w + radii * unit(problem.gradient(w, i)), i)
        optimizer.step(problem.closure(i))
        close(problem, w)


@pytest.mark.parametrize("kind", [SAM, FriendlySAM, AgnosticSAM, SAMPa])
def test_a_step_waits_for_the_device_once(kind: type[SAM]) -> None:
    problem = network()
    optimizer = kind(problem.model.parameters(), torch.optim.SGD, RHO, lr=LR, momentum=0.9, max_norm=1.0)
    second = {AgnosticSAM: [problem.closure(30)], SAMPa: [problem.closure(1)]}.get(kind, [])
    optimizer.step(problem.closure(0), *second)
    with Waits() as waits:
        optimizer.step(problem.closure(0), *second)
    assert waits.count == 1
