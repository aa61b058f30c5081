"""SAM against hand-written references in float64, and its contract as a torch optimizer."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import mse_loss
from torch.utils._python_dispatch import TorchDispatchMode

from samlite import SAM, AgnosticSAM, FriendlySAM, SAMPa

# Same formulas in float64 in another order: rounding only, amplified a little by Adam's division.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture(autouse=True)
def _private_random_state() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights_of(module: nn.Module) -> list[Tensor]:
    return [w.detach().clone() for w in module.parameters()]


def same(a: Any, b: Any) -> bool:
    """Bit for bit, through dicts and lists."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


class Quadratic(nn.Module):
    """½ wᵀAw − bᵀw of a vector and a matrix of weights; A is positive definite and each batch adds to b."""

    def __init__(self) -> None:
        super().__init__()
        factor = normal(10, 10, seed=1)
        self.a, self.b = factor @ factor.T / 10 + torch.eye(10), normal(10, seed=2)
        self.vector, self.matrix = nn.Parameter(normal(4, seed=3)), nn.Parameter(normal(2, 3, seed=4))

    def forward(self, x: Tensor) -> Tensor:
        w = torch.cat([self.vector, self.matrix.flatten()])
        return w @ self.a @ w / 2 - (self.b + x.mean(0)) @ w


class Network(nn.Module):
    """A two-layer tanh network's squared error on random targets."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(10, 6), nn.Tanh(), nn.Linear(6, 2)).double()
        for i, w in enumerate(self.body.parameters()):
            w.data.copy_(normal(*w.shape, seed=5 + i) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return mse_loss(self.body(x), x[:, :2].sin())


def backward(loss: Tensor) -> Tensor:
    loss.backward()
    return loss


def closure_for(module: nn.Module, *inputs: Tensor) -> Callable[[], Tensor]:
    return lambda: backward(module(*inputs))


# ---- References: SAM and its base optimizers as their papers write them, one tensor at a time ----

FORMS = {
    "sam": {},
    "adaptive": {"adaptive": True},
    "unnormalized": {"normalize": False},
    "adaptive unnormalized": {"adaptive": True, "normalize": False},
}


def epsilon(w: list[Tensor], g: list[Tensor], rho: float, adaptive=False, normalize=True) -> list[Tensor]:
    t = [wi.abs() if adaptive else torch.ones_like(wi) for wi in w]
    norm = sum((ti * gi).square().sum() for ti, gi in zip(t, g, strict=True)).sqrt() if normalize else 1.0
    return [rho * ti.square() * gi / norm for ti, gi in zip(t, g, strict=True)]


def sgd(w: Tensor, g: Tensor, state: dict, lr: float, momentum: float, weight_decay: float, nesterov: bool):
    g = g + weight_decay * w
    state["v"] = momentum * state["v"] + g if "v" in state else g
    return w - lr * (g + momentum * state["v"] if nesterov else state["v"])


def adam(w: Tensor, g: Tensor, state: dict, lr: float, weight_decay: float, decoupled: bool) -> Tensor:
    if decoupled:
        w = w * (1 - lr * weight_decay)
    else:
        g = g + weight_decay * w
    t = state["t"] = state.get("t", 0) + 1
    m = state["m"] = 0.9 * state.get("m", 0) + 0.1 * g
    v = state["v"] = 0.999 * state.get("v", 0) + 0.001 * g * g
    return w - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)


SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
ADAM = {"lr": 0.05, "weight_decay": 0.1}
BASES = {
    "sgd": (torch.optim.SGD, SGD, sgd, {"nesterov": False}),
    "nesterov": (torch.optim.SGD, {**SGD, "nesterov": True}, sgd, {}),
    "adam": (torch.optim.Adam, ADAM, adam, {"decoupled": False}),
    "adamw": (torch.optim.AdamW, ADAM, adam, {"decoupled": True}),
}


@pytest.mark.parametrize("problem", [Quadratic, Network])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("form", FORMS)
def test_steps_equal_the_hand_written_reference(problem: type[nn.Module], base: str, form: str) -> None:
    module = problem()
    optimizer_class, options, update, extra = BASES[base]
    optimizer = SAM(module.parameters(), optimizer_class, rho=0.1, **FORMS[form], **options)
    names = [name for name, _ in module.named_parameters()]
    expected, states = weights_of(module), [{} for _ in names]

    def loss_and_gradient(weights: list[Tensor], x: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        weights = [w.clone().requires_grad_() for w in weights]
        loss = functional_call(module, dict(zip(names, weights, strict=True)), (x,))
        return loss.detach(), torch.autograd.grad(loss, weights)

    for step in range(6):
        x = normal(7, 10, seed=100 + step)
        expected_loss, g = loss_and_gradient(expected, x)
        shift = epsilon(expected, list(g), 0.1, **FORMS[form])
        _, g = loss_and_gradient([w + e for w, e in zip(expected, shift, strict=True)], x)
        expected = [update(w, gi, state, **options, **extra) for w, gi, state in zip(expected, g, states, strict=True)]
        loss = optimizer.step(closure_for(module, x))
        torch.testing.assert_close(loss, expected_loss, **CLOSE)
    for w, e in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(w.detach(), e, **CLOSE)


# ---- The perturbation ----


def perturbation(optimizer: SAM, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    """epsilon as first_step leaves it, in float64."""
    before = [w.detach().clone() for w in weights]
    for w, g in zip(weights, gradients, strict=True):
        w.grad = g.clone()
    optimizer.first_step(zero_grad=True)
    return [w.detach().double() - b.double() for w, b in zip(weights, before, strict=True)]


def test_groups_have_their_own_rho_and_form_under_one_norm() -> None:
    a, b, c = (nn.Parameter(normal(3, seed=i)) for i in range(3))
    groups = [{"params": [a]}, {"params": [b], "rho": 0.3}, {"params": [c], "adaptive": True}]
    optimizer = SAM(groups, torch.optim.SGD, rho=0.1, lr=0.1)
    g = [normal(3, seed=10 + i) for i in range(3)]
    norm = torch.cat([g[0], g[1], c.detach().abs() * g[2]]).norm()
    expected = [0.1 * g[0] / norm, 0.3 * g[1] / norm, 0.1 * c.detach().square() * g[2] / norm]
    for found, e in zip(perturbation(optimizer, [a, b, c], g), expected, strict=True):
        torch.testing.assert_close(found, e, **CLOSE)


def test_a_group_with_rho_zero_stays_in_place_but_counts_in_the_norm() -> None:
    a, b = (nn.Parameter(normal(3, seed=i)) for i in range(2))
    optimizer = SAM([{"params": [a], "rho": 0.0}, {"params": [b]}], torch.optim.SGD, rho=0.1, lr=0.1)
    g = [normal(3, seed=10 + i) for i in range(2)]
    still, moved = perturbation(optimizer, [a, b], g)
    assert torch.equal(still, torch.zeros(3))
    torch.testing.assert_close(moved, 0.1 * g[1] / torch.cat(g).norm(), **CLOSE)


def test_weights_of_different_dtypes_share_one_norm() -> None:
    a, b = nn.Parameter(normal(3)), nn.Parameter(normal(3, seed=1).float())
    optimizer = SAM([a, b], torch.optim.SGD, rho=0.1, lr=0.1)
    found = torch.cat(perturbation(optimizer, [a, b], [normal(3, seed=2), normal(3, seed=3).float()]))
    # b is moved in float32, whose spacing near 1 is 1e-7
    torch.testing.assert_close(found.norm(), torch.tensor(0.1).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-6, 1e4])
def test_half_precision_gradients_neither_vanish_nor_overflow_in_the_norm(dtype, size: float) -> None:
    # The sum of squares is 4e-9 or 4e11, outside float16 both times; 1/norm is 16,000 or 2e-6.
    weight = nn.Parameter(torch.zeros(4000, dtype=dtype))
    optimizer = SAM([weight], torch.optim.SGD, rho=1.0, lr=0.1)
    (found,) = perturbation(optimizer, [weight], [torch.full((4000,), size, dtype=dtype)])
    # 1/sqrt(4000) is rounded to bfloat16's 8 bits at worst, and 1e-6 to float16's last 4
    torch.testing.assert_close(found.norm(), torch.tensor(1.0).double(), rtol=0.01, atol=0)


@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_float32_gradients_of_extreme_size_are_normalized(size: float) -> None:
    weight = nn.Parameter(torch.zeros(4))
    optimizer = SAM([weight], torch.optim.SGD, rho=0.5, lr=0.1)
    (found,) = perturbation(optimizer, [weight], [torch.full((4,), size)])
    torch.testing.assert_close(found, torch.full((4,), 0.25).double(), rtol=1e-6, atol=0)


def test_gradients_whose_squares_underflow_never_move_the_weights_further_than_rho() -> None:
    for exponent in range(-45, -18):
        weight = nn.Parameter(torch.zeros(1000))
        optimizer = SAM([weight], torch.optim.SGD, rho=0.5, lr=0.1)
        (found,) = perturbation(optimizer, [weight], [torch.full((1000,), 10.0**exponent)])
        assert found.norm() <= 0.5 * (1 + 1e-6)  # float32


@pytest.mark.parametrize("form", FORMS)
def test_a_zero_gradient_gives_no_perturbation(form: str) -> None:
    weight = nn.Parameter(normal(4))
    optimizer = SAM([weight], torch.optim.SGD, lr=0.1, **FORMS[form])
    (found,) = perturbation(optimizer, [weight], [torch.zeros(4).double()])
    assert torch.equal(found, torch.zeros(4))
    weight.grad = torch.ones(4).double()
    optimizer.second_step()
    assert optimizer.skipped == 0


def test_where_the_base_optimizer_maximizes_the_perturbation_points_downhill() -> None:
    weight = nn.Parameter(normal(4))
    optimizer = SAM([weight], torch.optim.SGD, rho=0.1, lr=0.1, maximize=True)
    g = normal(4, seed=1)
    torch.testing.assert_close(perturbation(optimizer, [weight], [g])[0], -0.1 * g / g.norm(), **CLOSE)


# ---- Weights are restored ----


def test_restoring_is_exact_and_in_place() -> None:
    lstm = nn.LSTM(3, 4).double()  # its flat weights break when storage is replaced
    optimizer = SAM(lstm.parameters(), torch.optim.SGD, rho=0.7, lr=0.0)
    before, places = weights_of(lstm), [w.data_ptr() for w in lstm.parameters()]
    x = normal(5, 2, 3)
    optimizer.step(lambda: backward(lstm(x)[0].square().mean()))
    assert same(weights_of(lstm), before)
    assert [w.data_ptr() for w in lstm.parameters()] == places
    assert all(a is b for a, b in zip(lstm._flat_weights, lstm.parameters(), strict=True))


def test_a_weight_without_gradient_in_one_of_the_passes_is_handled() -> None:
    first, second, never = (nn.Parameter(normal(3, seed=i)) for i in range(3))
    optimizer = SAM([first, second, never], torch.optim.SGD, rho=0.5, lr=0.1)
    before = [w.detach().clone() for w in (first, second, never)]
    passes = count()
    optimizer.step(lambda: backward((first if next(passes) == 0 else second).square().sum()))
    assert torch.equal(first, before[0])
    assert torch.equal(second, before[1] - 0.1 * 2 * before[1])
    assert torch.equal(never, before[2])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_the_second_pass_leaves_everything_as_after_the_first(error) -> None:
    model = nn.Sequential(nn.Linear(10, 3), nn.BatchNorm1d(3)).double()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.5, model=model, lr=0.1, momentum=0.9)
    x, passes, seen = normal(8, 10), count(), []

    def closure() -> Tensor:
        loss = backward(model(x).pow(3).mean())
        if next(passes):
            seen.append(weights_of(model))
            raise error
        return loss

    before = weights_of(model)
    with pytest.raises(error):
        optimizer.step(closure)
    assert same(weights_of(model), before) and not same(seen[0], before)
    assert model[1].num_batches_tracked == 1 and not optimizer.state
    optimizer.step(lambda: backward(model(x).pow(3).mean()))  # and the next step works
    assert not same(weights_of(model), before)


# ---- Gradients that are not finite ----


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("bad_pass", [0, 1])
@pytest.mark.parametrize("form", FORMS)
def test_a_pass_that_is_not_finite_skips_the_step(bad: float, bad_pass: int, form: str) -> None:
    module = Network()
    optimizer = SAM(module.parameters(), torch.optim.Adam, **FORMS[form], **ADAM)
    optimizer.step(closure_for(module, normal(7, 10)))
    before, state = weights_of(module), copy.deepcopy(optimizer.state_dict())
    passes = count()

    def closure() -> Tensor:
        loss = backward(module(normal(7, 10)))
        if next(passes) == bad_pass:
            module.body[0].bias.grad[2] = bad
        return loss

    optimizer.step(closure)
    assert next(passes) == 2
    assert same(weights_of(module), before) and same(optimizer.state_dict(), state)
    assert optimizer.skipped == 1
    optimizer.step(closure)
    assert not same(weights_of(module), before) and optimizer.skipped == 1


# ---- rho = 0 ----


class Noisy(nn.Sequential):
    """Batch norm and dropout: buffers and random numbers."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(10, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2))

    def loss(self, x: Tensor) -> Tensor:
        return mse_loss(self(x), x[:, :2])


@pytest.mark.parametrize("model_given", [True, False])
@pytest.mark.parametrize("base", BASES)
def test_rho_zero_is_the_base_optimizer_bit_for_bit(base: str, model_given: bool) -> None:
    def train(use_sam: bool) -> list[Any]:
        torch.manual_seed(0)
        model = Noisy()
        optimizer_class, options, *_ = BASES[base]
        if use_sam:
            given = model if model_given else None
            optimizer = SAM(model.parameters(), optimizer_class, rho=0, model=given, **options)
        else:
            optimizer = optimizer_class(model.parameters(), **options)
        losses = []
        for step in range(5):
            x = normal(16, 10, seed=step).float()

            def closure(x: Tensor = x) -> Tensor:
                optimizer.zero_grad()
                return backward(model.loss(x))

            losses.append(optimizer.step(closure).detach())
        return [losses, model.state_dict(), optimizer.state_dict()["state"], torch.get_rng_state()]

    assert same(train(True), train(False))


# ---- Buffers and random state ----


def test_batch_norm_statistics_come_from_the_first_pass_only() -> None:
    model = nn.Sequential(nn.Linear(10, 3), nn.BatchNorm1d(3)).double()
    once = copy.deepcopy(model)
    x = normal(8, 10)
    once(x)
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.5, model=model, lr=0.1)
    optimizer.step(lambda: backward(model(x).pow(3).mean()))
    assert same(dict(model.named_buffers()), dict(once.named_buffers()))


def test_without_model_both_passes_change_batch_norm() -> None:
    model = nn.Sequential(nn.Linear(10, 3), nn.BatchNorm1d(3)).double()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)
    optimizer.step(lambda: backward(model(normal(8, 10)).pow(3).mean()))
    assert model[1].num_batches_tracked == 2


class Replacing(nn.Module):
    """Assigns new tensors to its buffers instead of writing into them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(3))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("unused", None)

    def forward(self) -> Tensor:
        self.calls = self.calls + 1
        return self.weight.square().sum()


def test_buffers_that_a_module_replaces_are_kept_too() -> None:
    model = Replacing()
    optimizer = SAM(model.parameters(), torch.optim.SGD, model=model, lr=0.1)
    for _ in range(3):
        optimizer.step(closure_for(model))
    assert model.calls == 3


def test_both_passes_see_the_same_dropout() -> None:
    masks = []
    weight = nn.Parameter(torch.ones(1000))
    optimizer = SAM([weight], torch.optim.SGD, lr=0.0)

    def closure() -> Tensor:
        dropped = nn.functional.dropout(weight, 0.5)
        masks.append(dropped != 0)
        return backward(dropped.sum())

    optimizer.step(closure)
    optimizer.step(closure)
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[2], masks[3])
    assert not torch.equal(masks[0], masks[2])


def test_a_step_advances_the_random_stream_by_one_pass() -> None:
    torch.manual_seed(0)
    torch.rand(5)
    expected = torch.get_rng_state()
    weight = nn.Parameter(torch.ones(3))
    optimizer = SAM([weight], torch.optim.SGD, lr=0.1)

    def closure() -> Tensor:
        torch.rand(5)
        return backward(weight.sum())

    torch.manual_seed(0)
    optimizer.step(closure)
    assert torch.equal(torch.get_rng_state(), expected)


# ---- Closures ----


def test_a_list_of_closures_equals_the_step_on_the_whole_batch() -> None:
    whole, parts = Network(), Network()
    x = normal(12, 10)
    one = SAM(whole.parameters(), torch.optim.SGD, rho=0.1, **SGD)
    many = SAM(parts.parameters(), torch.optim.SGD, rho=0.1, **SGD)
    for _ in range(3):
        loss = one.step(closure_for(whole, x))
        mean = many.step([closure_for(parts, part) for part in x.split(4)])
        torch.testing.assert_close(mean, loss, **CLOSE)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_step_runs_two_passes_and_returns_the_loss_of_the_first() -> None:
    module, losses = Network(), []
    optimizer = SAM(module.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        losses.append(backward(module(normal(7, 10))))
        return losses[-1]

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert len(losses) == 2 and losses[1] > losses[0]
    assert torch.equal(loss, losses[0]) and not loss.requires_grad


def test_gradients_are_zeroed_before_each_pass_and_a_closure_may_do_so_too() -> None:
    results = []
    for stale, zeroing in ((False, False), (True, False), (False, True)):
        module = Network()
        optimizer = SAM(module.parameters(), torch.optim.SGD, **SGD)
        if stale:
            module(normal(7, 10, seed=9)).backward()

        def closure(module=module, optimizer=optimizer, zeroing=zeroing) -> Tensor:
            if zeroing:
                optimizer.zero_grad()
            return backward(module(normal(7, 10)))

        optimizer.step(closure)
        results.append(weights_of(module))
    assert same(results[0], results[1]) and same(results[0], results[2])


def test_first_and_second_step_by_hand_equal_step() -> None:
    by_hand, by_step = Network(), Network()
    x = normal(7, 10)
    manual = SAM(by_hand.parameters(), torch.optim.SGD, **SGD)
    automatic = SAM(by_step.parameters(), torch.optim.SGD, **SGD)
    for _ in range(3):
        by_hand(x).backward()
        manual.first_step(zero_grad=True)
        by_hand(x).backward()
        manual.second_step(zero_grad=True)
        automatic.step(closure_for(by_step, x))
    assert same(weights_of(by_hand), weights_of(by_step))
    assert all(w.grad is None for w in by_hand.parameters())


def test_scaled_losses_unscaled_by_hand_give_the_same_step() -> None:
    scaled, plain = Network(), Network()
    x, scale = normal(7, 10), 2.0**10  # a power of two: exact
    optimizer = SAM(scaled.parameters(), torch.optim.SGD, rho=0.1, **SGD)

    def unscaled_backward() -> None:
        (scale * scaled(x)).backward()
        for w in scaled.parameters():
            w.grad.div_(scale)

    unscaled_backward()
    optimizer.first_step(zero_grad=True)
    unscaled_backward()
    optimizer.second_step(zero_grad=True)
    SAM(plain.parameters(), torch.optim.SGD, rho=0.1, **SGD).step(closure_for(plain, x))
    assert same(weights_of(scaled), weights_of(plain))


def test_a_step_by_hand_is_dropped_by_zero_grad_and_second_step() -> None:
    module = Network()
    optimizer = SAM(module.parameters(), torch.optim.Adam, **ADAM)
    before = weights_of(module)
    module(normal(7, 10)).backward()
    optimizer.first_step()
    assert not same(weights_of(module), before)
    optimizer.zero_grad()
    optimizer.second_step()
    assert same(weights_of(module), before) and not optimizer.state


# ---- A torch optimizer ----


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.step(closure_for(module, normal(7, 10, seed=step)))


@pytest.mark.parametrize("base", BASES)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(base: str) -> None:
    def start(lr: float) -> tuple[nn.Module, SAM, Any]:
        module = Network()
        optimizer_class, options, *_ = BASES[base]
        optimizer = SAM(module.parameters(), optimizer_class, rho=0.1, **{**options, "lr": lr})
        return module, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)

    def run(module: nn.Module, optimizer: SAM, scheduler: Any, steps: range) -> None:
        for step in steps:
            train(module, optimizer, range(step, step + 1))
            scheduler.step()

    straight = start(0.05)
    run(*straight, range(8))
    broken = start(0.05)
    run(*broken, range(3))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in broken], file)
    file.seek(0)
    resumed = start(0.7)  # the checkpoint's learning rate counts
    for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    run(*resumed, range(3, 8))
    assert same([p.state_dict() for p in resumed[:2]], [p.state_dict() for p in straight[:2]])
    assert resumed[1].base_optimizer.param_groups is resumed[1].param_groups
    assert resumed[1].base_optimizer.state is resumed[1].state


def test_state_dict_is_that_of_the_base_optimizer_with_no_copy_of_the_weights() -> None:
    with_sam, without = Network(), Network()
    optimizer = SAM(with_sam.parameters(), torch.optim.SGD, **SGD)
    plain = torch.optim.SGD(without.parameters(), **SGD)
    train(with_sam, optimizer, range(2))
    for _ in range(2):
        without(normal(7, 10)).backward()
        plain.step()
    state, expected = optimizer.state_dict(), plain.state_dict()
    assert {i: s.keys() for i, s in state["state"].items()} == {i: s.keys() for i, s in expected["state"].items()}
    own = {"rho": 0.05, "adaptive": False, "normalize": True}
    assert state["param_groups"] == [{**expected["param_groups"][0], **own}]


def test_a_checkpoint_of_the_base_optimizer_alone_can_be_continued_with_sam() -> None:
    module = Network()
    plain = torch.optim.SGD(module.parameters(), **SGD)
    module(normal(7, 10)).backward()
    plain.step()
    optimizer = SAM(module.parameters(), torch.optim.SGD, rho=0.2, **SGD)
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["rho"] == 0.2
    assert same(optimizer.state_dict()["state"], plain.state_dict()["state"])
    train(module, optimizer, range(1))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_and_pickles_go_on_as_the_original(duplicate: Callable[[Any], Any]) -> None:
    module = Network()
    optimizer = SAM(module.parameters(), torch.optim.SGD, model=module, rho=0.1, **SGD)
    train(module, optimizer, range(2))
    twin, twin_optimizer = duplicate((module, optimizer))
    assert twin_optimizer.model is twin
    train(module, optimizer, range(2, 5))
    train(twin, twin_optimizer, range(2, 5))
    assert same(twin.state_dict(), module.state_dict())
    assert same(twin_optimizer.state_dict(), optimizer.state_dict())


def test_a_scheduler_acts_on_the_base_optimizer_without_warnings() -> None:
    for by_hand in (False, True):
        weight = nn.Parameter(torch.ones(1).double())
        optimizer = SAM([weight], torch.optim.SGD, lr=1.0)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for _ in range(3):
            if by_hand:
                weight.sum().backward()
                optimizer.first_step(zero_grad=True)
                weight.sum().backward()
                optimizer.second_step(zero_grad=True)
            else:
                optimizer.step(lambda weight=weight: backward(weight.sum()))
            scheduler.step()
        assert weight.item() == 1 - 1 - 0.5 - 0.25


def test_a_scheduler_may_cycle_the_momentum() -> None:
    module = Network()
    optimizer = SAM(module.parameters(), torch.optim.SGD, **SGD)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=5)
    train(module, optimizer, range(1))
    scheduler.step()
    assert optimizer.base_optimizer.param_groups[0]["momentum"] != 0.9


def test_an_added_group_is_trained_with_its_own_rho() -> None:
    a, b = nn.Parameter(normal(3)), nn.Parameter(normal(3, seed=1))
    optimizer = SAM([a], torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
    optimizer.add_param_group({"params": [b], "rho": 0.4, "lr": 0.2})
    assert [g["rho"] for g in optimizer.base_optimizer.param_groups] == [0.1, 0.4]
    assert optimizer.param_groups[1]["momentum"] == 0.9
    before = b.detach().clone()
    optimizer.step(lambda: backward(a.sum() + b.sum()))
    torch.testing.assert_close(b.detach(), before - 0.2, **CLOSE)


def test_named_parameters_keep_their_names() -> None:
    optimizer = SAM(Network().named_parameters(), torch.optim.SGD, lr=0.1)
    assert optimizer.state_dict()["param_groups"][0]["param_names"][0] == "body.0.weight"


@pytest.mark.parametrize("kind", [SAM, FriendlySAM, AgnosticSAM, SAMPa])
def test_hooks_run_once_a_step(kind: type[SAM]) -> None:
    module, calls = Network(), []
    optimizer = kind(module.parameters(), torch.optim.SGD, lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.base_optimizer.register_step_post_hook(lambda *_: calls.append("base"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("saved"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("loaded"))

    closure = closure_for(module, normal(6, 10, seed=0))
    optimizer.step(*[closure] * (2 if kind in (AgnosticSAM, SAMPa) else 1))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["before", "base", "after", "saved", "loaded"]


# ---- Waiting for the device ----


class HostReads(TorchDispatchMode):
    """Lists the operations for which the host waits for a tensor's values, or which move them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        moves = name == "_to_copy" and "device" in (kwargs or {})
        if moves or name in ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_the_host_reads_one_number_a_step(form: str, micro_batches: int) -> None:
    model = Noisy()
    groups = [{"params": [w]} for w in model.parameters()]
    optimizer = SAM(groups, torch.optim.SGD, model=model, **FORMS[form], **SGD)
    x = normal(16, 10).float()
    closures = [lambda: backward(model.loss(x))] * micro_batches
    for _ in range(2):
        with HostReads() as reads:
            optimizer.step(closures)
        assert reads.found == ["_local_scalar_dense"]


def test_with_rho_zero_the_host_reads_nothing() -> None:
    module = Network()
    optimizer = SAM(module.parameters(), torch.optim.SGD, rho=0.0, **SGD)
    with HostReads() as reads:
        train(module, optimizer, range(2))
    assert reads.found == []


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_weights_on_two_devices_share_one_norm_and_replay_their_dropout() -> None:
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(300, device="cuda"))
    optimizer = SAM([a, b], torch.optim.SGD, rho=0.1, lr=0.1)
    found = perturbation(optimizer, [a, b], [torch.ones(3), torch.ones(300, device="cuda")])
    total = torch.cat([f.cpu() for f in found]).norm()
    torch.testing.assert_close(total, torch.tensor(0.1).double(), rtol=1e-4, atol=0)  # float32 around 1
    optimizer.zero_grad()
    optimizer.second_step()
    masks = []

    def closure() -> Tensor:
        dropped = nn.functional.dropout(b, 0.5)
        masks.append(dropped != 0)
        return backward(dropped.sum() + a.sum().cuda())

    optimizer.step(closure)
    assert torch.equal(masks[0], masks[1])


# ---- Bad arguments ----

W = [nn.Parameter(torch.ones(2))]
SGD_CLASS = torch.optim.SGD
MALFORMED = [
    (lambda: SAM(W, SGD_CLASS, rho=-1), "rho must be >= 0 and finite, got -1; use rho=0"),
    (lambda: SAM(W, SGD_CLASS, rho=float("nan")), "rho must be >= 0 and finite, got nan"),
    (lambda: SAM(W, SGD_CLASS, rho=float("inf")), "rho must be >= 0 and finite, got inf"),
    (lambda: SAM(W, SGD_CLASS, rho="0.1"), "rho must be >= 0 and finite, got '0.1'"),
    (lambda: SAM(W, SGD_CLASS, rho=None), "rho must be >= 0 and finite, got None"),
    (lambda: SAM([{"params": W, "rho": -2}], SGD_CLASS), "rho must be >= 0 and finite, got -2"),
    (
        lambda: SAM(W, SGD_CLASS).add_param_group({"params": [nn.Parameter(torch.ones(1))], "rho": -3}),
        "rho must be >= 0 and finite, got -3",
    ),
    (lambda: SAM(W, SAM(W, SGD_CLASS)), "base_optimizer must step without a closure, got SAM"),
    (lambda: SAM(W, SGD_CLASS(W), lr=0.1), "lr must be given to the base optimizer, which is made already"),
    (lambda: SAM(W, SGD_CLASS([torch.ones(1)])), "params must be the weights of base_optimizer, got others"),
    (lambda: SAM(W, "sgd"), "base_optimizer must be an optimizer class, got a str"),
    (lambda: SAM(W, nn.Linear), "base_optimizer must be an optimizer class, got a type"),
    (lambda: SAM(W, torch.optim.LBFGS), "base_optimizer must step without a closure, got LBFGS"),
    (lambda: SAM(W, torch.optim.Adadelta), "base_optimizer must not have a rho, got Adadelta"),
    (lambda: SAM(W, SGD_CLASS, model=W), "model must be a torch.nn.Module, got a list; pass the network"),
    (lambda: SAM([], SGD_CLASS), "optimizer got an empty parameter list"),
    (lambda: SAM(W, SGD_CLASS, lr=-1), "Invalid learning rate: -1"),
    (
        lambda: SAM(W, SGD_CLASS).step(),
        "closure must be a function .* got NoneType; .*first_step.*second_step.*scaler.step",
    ),
    (lambda: SAM(W, SGD_CLASS).step([]), "closure must be a function .* or a list of them, got list"),
    (lambda: SAM(W, SGD_CLASS).step([backward, 3]), "closure must be a function .* got list"),
    (lambda: SAM(W, SGD_CLASS).step(torch.ones(1)), "closure must be a function .* got Tensor"),
    (lambda: SAM(W, SGD_CLASS).step(lambda: None), "closure must return its loss, a tensor, got NoneType"),
    (lambda: SAM(W, SGD_CLASS).step(lambda: 0.5), "closure must return its loss, a tensor, got float"),
    (lambda: SAM(W, SGD_CLASS).second_step(), "second_step was called before first_step"),
]


@pytest.mark.parametrize(("call", "message"), MALFORMED)
def test_malformed_calls_get_one_line_that_says_what_to_do(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_misspelt_option_is_named() -> None:
    with pytest.raises(TypeError, match="nestrov"):
        SAM(W, SGD_CLASS, nestrov=True)


def test_first_step_twice_is_an_error_that_leaves_the_first_in_place() -> None:
    module = Network()
    optimizer = SAM(module.parameters(), torch.optim.SGD, lr=0.1)
    before = weights_of(module)
    module(normal(7, 10)).backward()
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="first_step was called twice"):
        optimizer.first_step()
    optimizer.zero_grad()
    optimizer.second_step()
    assert same(weights_of(module), before)


def test_sparse_gradients_are_refused_before_anything_moves() -> None:
    table = nn.Embedding(5, 2, sparse=True)
    optimizer = SAM(table.parameters(), torch.optim.SGD, lr=0.1)
    before = weights_of(table)
    with pytest.raises(ValueError, match="gradients must be dense, got torch.sparse_coo; use sparse=False"):
        optimizer.step(lambda: backward(table(torch.tensor([1, 2])).sum()))
    assert same(weights_of(table), before)
