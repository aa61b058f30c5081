"""SAM in loops that others wrote: regions around the step, scalers, closures that fail, weights that come and go."""

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize

from samlite import SAM, AgnosticSAM, FriendlySAM, RhoScheduler, SAMPa

KINDS = [SAM, FriendlySAM, AgnosticSAM, SAMPa]
STEPS = 3
Closure = Callable[[], Tensor]


@pytest.fixture(autouse=True)
def _private_random_state() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def batch(i: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(i)
    return torch.randn(16, 6, generator=draw), torch.randint(0, 3, (16,), generator=draw)


def backward(loss: Tensor) -> Tensor:
    loss.backward()
    return loss


def closure_on(model: nn.Module, i: int) -> Closure:
    inputs, targets = batch(i)
    return lambda: backward(cross_entropy(model(inputs), targets))


def closures(kind: type[SAM], make: Callable[[int], Any], i: int) -> list[Any]:
    """The arguments of a step, as each kind takes them."""
    return [make(i), *{AgnosticSAM: [make(50 + i)], SAMPa: [make(i + 1)]}.get(kind, [])]


def weights_of(model: nn.Module) -> Tensor:
    return torch.cat([w.detach().flatten() for w in model.parameters()])


# ---- Regions that remember what they computed from the weights ----


def in_regions(kind: type[SAM], where: str, rho: float = 0.5, **options: Any) -> Tensor:
    """The weights after steps with the region in each closure, around each step, or around all of them."""
    region = partial(torch.autocast, "cpu", torch.bfloat16)
    outer, middle, inner = (region if place == where else nullcontext for place in ("all", "step", "closure"))
    model = network()
    optimizer = kind(model.parameters(), torch.optim.SGD, rho=rho, lr=0.1, momentum=0.9, **options)

    def make(i: int) -> Any:
        def run(part: Closure) -> Tensor:
            with inner():
                return part()

        parts = [closure_on(model, i), closure_on(model, i + 20)]
        return [partial(run, part) for part in parts]

    with outer():
        for i in range(STEPS):
            with middle():
                optimizer.step(*closures(kind, make, i))
    return weights_of(model)


@pytest.mark.parametrize("where", ["step", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_autocast_region_around_the_step_is_one_in_the_closure(kind: type[SAM], where: str) -> None:
    assert torch.equal(in_regions(kind, where), in_regions(kind, "closure"))
    assert not torch.equal(in_regions(kind, where), in_regions(SAM, "closure", rho=0.0))


def test_an_autocast_region_around_a_step_of_m_sam_is_one_in_the_closure() -> None:
    assert torch.equal(in_regions(SAM, "step", m=1), in_regions(SAM, "closure", m=1))
    assert not torch.equal(in_regions(SAM, "step", m=1), in_regions(SAM, "step"))


def test_an_autocast_region_around_a_step_by_hand_is_one_in_the_closure() -> None:
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1, momentum=0.9)
    with torch.autocast("cpu", torch.bfloat16):
        for i in range(STEPS):
            for step in (optimizer.first_step, optimizer.second_step):
                for part in (i, i + 20):
                    (closure_on(model, part)() / 2).detach()
                for weight in model.parameters():
                    weight.grad /= 2
                step(zero_grad=True)
    assert torch.equal(weights_of(model), in_regions(SAM, "closure"))


def test_the_second_of_two_processes_of_sampa_casts_the_weights_anew_at_y() -> None:
    model = network()
    optimizer = SAMPa(model.parameters(), torch.optim.SGD, rho=0.5, lr=1.0)
    closure, moved = closure_on(model, 0), network()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():  # that process leaves out x + epsilon
        optimizer._run([closure])
        ahead = optimizer._grads()
        found, _ = optimizer._at_y(ahead, [closure])
    for weight, grad in zip(moved.parameters(), ahead.values(), strict=True):
        weight.data -= grad
    with torch.autocast("cpu", torch.bfloat16):
        closure_on(moved, 0)()
    assert all(torch.equal(grad, weight.grad) for grad, weight in zip(found.values(), moved.parameters(), strict=True))


class Shifted(nn.Module):
    """A parametrization without saved tensors: what is cached of it could be differentiated again."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight + 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_region_that_caches_parametrizations_changes_nothing(kind: type[SAM]) -> None:
    def trained(region: Any) -> Tensor:
        model = network()
        parametrize.register_parametrization(model[2], "weight", Shifted())
        optimizer = kind(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)
        for i in range(STEPS):
            with region():
                optimizer.step(*closures(kind, partial(closure_on, model), i))
        return weights_of(model)

    assert torch.equal(trained(parametrize.cached), trained(nullcontext))


# ---- A scaler that is switched off ----


@pytest.mark.parametrize("kind", KINDS)
def test_a_disabled_scaler_is_none(kind: type[SAM]) -> None:
    def trained(scaler: Any) -> tuple[Tensor, int]:
        model = network()
        optimizer = kind(model.parameters(), torch.optim.Adam, rho=0.1, lr=0.01, scaler=scaler)
        for i in range(STEPS):
            optimizer.step(*closures(kind, partial(closure_on, model), i))
        before = weights_of(model)
        broken = partial(backward_of_infinity, model)
        optimizer.step(*closures(kind, lambda _: broken, 0))
        assert torch.equal(weights_of(model), before)
        return before, optimizer.skipped

    weights, skipped = trained(torch.amp.GradScaler("cpu", enabled=False))
    expected, _ = trained(None)
    assert torch.equal(weights, expected) and skipped == 1


def backward_of_infinity(model: nn.Module) -> Tensor:
    inputs, targets = batch(0)
    inputs[0, 0] = float("inf")
    return backward(cross_entropy(model(inputs), targets))


def test_steps_by_hand_go_with_a_disabled_scaler() -> None:
    results = []
    for scaler in (torch.amp.GradScaler("cpu", enabled=False), None):
        model = network()
        optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, scaler=scaler)
        closure_on(model, 0)()
        optimizer.first_step(zero_grad=True)
        closure_on(model, 0)()
        optimizer.second_step(zero_grad=True)
        results.append(weights_of(model))
    assert torch.equal(*results)


def test_rho_zero_with_a_disabled_scaler_is_the_base_optimizer() -> None:
    sam, plain = network(), network()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    SAM(sam.parameters(), torch.optim.SGD, rho=0, lr=0.1, scaler=scaler).step(partial(backward_of_infinity, sam))
    backward_of_infinity(plain)
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    torch.testing.assert_close(weights_of(sam), weights_of(plain), rtol=0, atol=0, equal_nan=True)


# ---- Closures without a backward pass ----


@pytest.mark.parametrize("rho", [0.0, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_closure_that_forgets_backward_is_told_so(kind: type[SAM], rho: float) -> None:
    model = network()
    optimizer = kind(model.parameters(), torch.optim.SGD, rho=rho, lr=0.1)

    def forgetful(i: int) -> Closure:
        inputs, targets = batch(i)
        return lambda: cross_entropy(model(inputs), targets)

    message = r"closure must run backward, but no weight has a gradient; call loss.backward\(\) in it"
    for _ in range(2):  # from the first step, and later
        with pytest.raises(ValueError, match=message):
            optimizer.step(*closures(kind, forgetful, 0))
        optimizer.step(*closures(kind, partial(closure_on, model), 0))


def test_backward_is_missed_although_other_weights_have_gradients() -> None:
    body, head = nn.Linear(6, 8), nn.Linear(8, 3)
    closure_on(nn.Sequential(body, head), 0)()
    optimizer = SAM(head.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="closure must run backward"):
        optimizer.step(lambda: cross_entropy(head(body(batch(0)[0])), batch(0)[1]))


@pytest.mark.parametrize("detach", [Tensor.detach, torch.no_grad()(Tensor.clone)])
def test_a_first_closure_that_forgets_backward_and_returns_no_graph_is_told_so(detach: Any) -> None:
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="closure must run backward"):
        optimizer.step(lambda: detach(cross_entropy(model(batch(0)[0]), batch(0)[1])))


def test_a_first_step_by_hand_without_backward_is_told_so() -> None:
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="first_step must come after backward"):
        optimizer.first_step()
    closure_on(model, 0)()
    optimizer.first_step(zero_grad=True)
    closure_on(model, 0)()
    optimizer.second_step(zero_grad=True)
    optimizer.first_step()  # now it may be a batch with nothing to learn from
    optimizer.second_step()


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_whose_loss_depends_on_none_of_the_weights_moves_nothing(kind: type[SAM]) -> None:
    expert, other = network(), network()  # as in a mixture of experts, each with an optimizer of its own
    optimizer = kind(expert.parameters(), torch.optim.Adam, lr=0.1)
    optimizer.step(*closures(kind, partial(closure_on, other), 0))
    assert torch.equal(weights_of(expert), weights_of(network())) and optimizer.skipped == 0
    optimizer.step(*closures(kind, partial(closure_on, expert), 0))
    assert not torch.equal(weights_of(expert), weights_of(network()))
    before = weights_of(expert)
    optimizer.step(*closures(kind, lambda _: lambda: torch.zeros(()), 0))  # a batch with nothing to learn from
    # SAMPa still has the gradient of the last step's next batch to perturb by, and no gradient to step with
    assert torch.equal(weights_of(expert), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_with_all_weights_frozen_moves_nothing(kind: type[SAM]) -> None:
    model = network().requires_grad_(False)
    optimizer = kind(model.parameters(), torch.optim.SGD, lr=0.1)

    def make(i: int) -> Closure:
        inputs, targets = batch(i)
        return lambda: cross_entropy(model(inputs), targets)

    loss = optimizer.step(*closures(kind, make, 0))
    assert torch.equal(loss, make(0)()) and torch.equal(weights_of(model), weights_of(network()))


# ---- Errors ----


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("where", ["_foreach_addcdiv_", "_foreach_abs"])
def test_an_error_on_the_way_up_leaves_no_weight_perturbed(by_hand: bool, where: str, monkeypatch: Any) -> None:
    model = network()
    model[2].double()  # a bucket of its own: the weights of the first are perturbed by then
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.5, adaptive=True, lr=0.1)
    closure = closure_on(nn.Sequential(model[:2], Doubled(), model[2]), 0)
    calls, real = count(), getattr(torch, where)

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(calls):
            raise InterruptedError
        return real(*args, **kwargs)

    before = [w.detach().clone() for w in model.parameters()]
    closure()
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(torch, where, failing)
        optimizer.first_step() if by_hand else optimizer.step(closure)
    assert all(torch.equal(w, b) for w, b in zip(model.parameters(), before, strict=True))
    optimizer.step(closure)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double()


# ---- Buffers behind a step that is skipped ----


@pytest.mark.parametrize("options", [{}, {"rho": 0.0, "max_norm": 1.0}])
@pytest.mark.parametrize("kind", KINDS)
def test_a_skipped_step_leaves_the_buffers_as_they_were(kind: type[SAM], options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    optimizer = kind(model.parameters(), torch.optim.SGD, model=model, lr=0.1, **options)
    optimizer.step(*closures(kind, partial(closure_on, model), 0))
    before = copy.deepcopy(dict(model.named_buffers()))
    optimizer.step(*closures(kind, lambda _: partial(backward_of_infinity, model), 0))
    assert optimizer.skipped == 1 and int(before["1.num_batches_tracked"]) == 1
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    optimizer.step(*closures(kind, partial(closure_on, model), 1))
    assert int(model[1].num_batches_tracked) == 2 and model[1].running_var.isfinite().all()


def test_m_sam_leaves_the_buffers_as_they_were_if_one_of_its_groups_is_not_finite() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    optimizer = SAM(model.parameters(), torch.optim.SGD, model=model, m=1, lr=0.1)
    optimizer.step([closure_on(model, 0), partial(backward_of_infinity, model)])
    assert optimizer.skipped == 1 and model[1].num_batches_tracked == 0
    assert torch.equal(model[1].running_mean, torch.zeros(8))


def test_buffers_that_the_first_pass_makes_are_kept() -> None:
    model = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.LazyLinear(3))
    optimizer = SAM(model.parameters(), torch.optim.SGD, model=model, lr=0.1)
    optimizer.step(closure_on(model, 0))
    assert model[1].num_batches_tracked == 1


# ---- Weights that come and go ----


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop, torch.optim.NAdam])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_frozen_released_and_added_train_on(kind: type[SAM], base: Any) -> None:
    model, late = network(), nn.Linear(3, 3)
    optimizer = kind(model.parameters(), base, rho=0.1, lr=0.01)
    make = partial(closure_on, nn.Sequential(model, late))
    optimizer.step(*closures(kind, make, 0))
    model[0].requires_grad_(False)
    frozen, trained = weights_of(model[0]), weights_of(model[2])
    optimizer.step(*closures(kind, make, 1))
    optimizer.step(*closures(kind, make, 2))
    assert torch.equal(weights_of(model[0]), frozen) and not torch.equal(weights_of(model[2]), trained)
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": late.parameters(), "rho": 0.2})
    before = weights_of(late)
    optimizer.step(*closures(kind, make, 3))
    optimizer.step(*closures(kind, make, 4))
    assert not torch.equal(weights_of(model[0]), frozen) and not torch.equal(weights_of(late), before)
    assert optimizer.skipped == 0


def test_sampa_does_not_perturb_weights_frozen_since_its_last_gradient() -> None:
    model, seen = network(), []
    optimizer = SAMPa(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)
    optimizer.step(closure_on(model, 0), closure_on(model, 1))
    model[0].requires_grad_(False)
    frozen = weights_of(model[0])

    def closure() -> Tensor:
        seen.append(weights_of(model[0]))
        return closure_on(model, 1)()

    optimizer.step(closure, closure)
    assert len(seen) == 2 and all(torch.equal(weights, frozen) for weights in seen)


def test_an_empty_group_is_no_obstacle() -> None:
    for kind in KINDS:
        model = network()
        optimizer = kind([{"params": []}, {"params": model.parameters()}], torch.optim.SGD, lr=0.1)
        optimizer.step(*closures(kind, partial(closure_on, model), 0))
        assert not torch.equal(weights_of(model), weights_of(network()))


class Counting(torch.optim.SGD):
    """An optimizer that keeps more than tensors by weight, as schedule-free ones and Prodigy do."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        for group in self.param_groups:
            group["k"] = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["k"] += 1
            group["lr"] = 0.1 / group["k"]
            for weight in group["params"]:
                self.state[weight].setdefault("history", []).append(group["k"])
        super().step()


def test_the_step_that_sampa_tries_leaves_no_trace_in_the_base_optimizer() -> None:
    model = network()
    optimizer = SAMPa(model.parameters(), Counting, lr=0.1)
    for i in range(STEPS):
        optimizer.step(closure_on(model, i), closure_on(model, i + 1))
    assert [group["k"] for group in optimizer.param_groups] == [STEPS]
    assert [values["history"] for values in optimizer.state.values()] == [[1, 2, 3]] * 4


# ---- What a constructor takes ----


def test_rho_may_be_a_tensor_and_the_base_optimizer_a_partial() -> None:
    results = []
    for rho, base in ((0.5, torch.optim.SGD), (torch.tensor(0.5), partial(torch.optim.SGD, momentum=0.9))):
        model = network()
        optimizer = SAM(model.parameters(), base, rho, lr=0.1, **({} if results else {"momentum": 0.9}))
        for i in range(STEPS):
            optimizer.step(closure_on(model, i))
        results.append(weights_of(model))
        assert optimizer.param_groups[0]["rho"] == 0.5
    assert torch.equal(*results)
    with pytest.raises(ValueError, match="rho must be >= 0 and finite, got -0.5"):
        SAM(model.parameters(), torch.optim.SGD, torch.tensor(-0.5))
    with pytest.raises(ValueError, match="base_optimizer must be an optimizer class, got a type"):
        SAM(model.parameters(), partial(nn.Linear, 3))
    with pytest.raises(ValueError, match="base_optimizer must step without a closure, got LBFGS"):
        SAM(model.parameters(), partial(torch.optim.LBFGS, lr=1))


def test_modes_of_the_base_optimizer_are_passed_on() -> None:
    class Modal(torch.optim.SGD):
        mode = "train"

        def train(self) -> None:
            self.mode = "train"

        def eval(self) -> None:
            self.mode = "eval"

    optimizer = SAM(network().parameters(), Modal, lr=0.1)
    optimizer.eval()
    assert optimizer.base_optimizer.mode == "eval"
    optimizer.train()
    assert optimizer.base_optimizer.mode == "train"
    assert not hasattr(SAM(network().parameters(), torch.optim.SGD, lr=0.1), "train")


@pytest.mark.parametrize("kind", [SAM, FriendlySAM, SAMPa])
def test_the_base_optimizer_may_be_an_optimizer_of_the_same_weights(kind: type[SAM]) -> None:
    """With its state, and with the options of each group."""
    results = []
    for given in (False, True):
        model = network()
        first, *rest = model.parameters()
        groups = [{"params": [first], "lr": 0.2, "rho": 0.3}, {"params": rest}]
        base = torch.optim.SGD(groups if not given else [{"params": [first], "lr": 0.2}, {"params": rest}], lr=0.1,
                               momentum=0.9)  # fmt: skip
        if given:
            optimizer = kind([{"params": [first], "rho": 0.3}, {"params": rest}], base, 0.1)
            assert optimizer.base_optimizer is base
        else:
            optimizer = kind(groups, torch.optim.SGD, 0.1, lr=0.1, momentum=0.9)
        for i in range(STEPS):
            closures = [closure_on(model, i)] + ([closure_on(model, i + 1)] if kind is SAMPa else [])
            optimizer.step(*closures)
        results.append(weights_of(model))
        assert [group["rho"] for group in optimizer.param_groups] == [0.3, 0.1]
    assert torch.equal(*results)


def test_a_schedule_of_rho_multiplies_that_of_each_group_and_resumes() -> None:
    model = network()
    first, *rest = model.parameters()
    optimizer = SAM([{"params": [first], "rho": 0.4}, {"params": rest}], torch.optim.SGD, 0.1, lr=0.1)
    schedule = RhoScheduler(optimizer, lambda step: step / 4)
    calls = 0

    def counted() -> Tensor:
        nonlocal calls
        calls += 1
        return closure_on(model, 0)()

    seen = []
    for _ in range(3):
        optimizer.step(counted)
        seen.append((calls, *schedule.get_last_rho()))
        schedule.step()
    assert seen == [(1, 0, 0), (3, 0.1, 0.025), (5, 0.2, 0.05)]  # one gradient where rho is 0
    other = RhoScheduler(optimizer, [lambda step: step / 4, lambda step: 1.0])
    other.load_state_dict(schedule.state_dict())
    assert other.get_last_rho() == pytest.approx([0.3, 0.1])
    optimizer.param_groups[0]["rho"] = torch.tensor(0.25)  # by hand, too
    optimizer.step(counted)
    for scheduled, factor, message in (
        (torch.optim.SGD([first]), lambda step: 1.0, "must have groups with a rho, got SGD; use samlite.SAM"),
        (optimizer, [lambda step: 1.0], "one of each of 2 groups, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            RhoScheduler(scheduled, factor)


def test_scaler_step_and_step_after_backward_get_the_three_lines_that_work() -> None:
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.randn(2, 6)).sum()).backward()
    with pytest.raises(ValueError, match=r"first_step\(zero_grad=True\); .*; optimizer.second_step\(\)"):
        scaler.step(optimizer)
    with pytest.raises(ValueError, match=r"pass scaler=scaler to the optimizer"):
        optimizer.step()
