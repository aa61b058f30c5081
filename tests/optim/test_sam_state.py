"""SAM and its base optimizer have one state and one list of groups, however these are replaced, loaded or saved."""

import copy
import pickle
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn.functional import cross_entropy

from samlite import SAM, AgnosticSAM, FriendlySAM, SAMPa

pytestmark = pytest.mark.usefixtures("float64")

KINDS = [SAM, FriendlySAM, AgnosticSAM, SAMPa]
SGD = {"lr": 0.1, "momentum": 0.9}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def backward(loss: Tensor) -> Tensor:
    loss.backward()
    return loss


def closure_on(model: nn.Module, i: int) -> Callable[[], Tensor]:
    draw = torch.Generator().manual_seed(i)
    inputs, targets = torch.randn(16, 6, generator=draw), torch.randint(0, 3, (16,), generator=draw)
    return lambda: backward(cross_entropy(model(inputs), targets))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for i in steps:
        second = {AgnosticSAM: [closure_on(model, 50 + i)], SAMPa: [closure_on(model, i + 1)]}.get(type(optimizer), [])
        optimizer.step(closure_on(model, i), *second)


def weights_of(model: nn.Module) -> Tensor:
    return torch.cat([w.detach().flatten() for w in model.parameters()])


def is_one(optimizer: SAM) -> bool:
    base = optimizer.base_optimizer
    return optimizer.state is base.state and optimizer.param_groups is base.param_groups


# ---- Replaced ----


@pytest.mark.parametrize("replaced", ["optimizer", "base_optimizer"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_is_reset_is_so_for_both(kind: type[SAM], replaced: str) -> None:
    model = network()
    optimizer = kind(model.parameters(), torch.optim.SGD, **SGD)
    train(model, optimizer, range(3))
    fresh = network()
    fresh.load_state_dict(model.state_dict())
    target: Any = optimizer if replaced == "optimizer" else optimizer.base_optimizer
    target.state = defaultdict(dict)
    assert is_one(optimizer) and optimizer.state_dict()["state"] == {}
    train(model, optimizer, range(3, 5))
    train(fresh, kind(fresh.parameters(), torch.optim.SGD, **SGD), range(3, 5))
    assert torch.equal(weights_of(model), weights_of(fresh))
    assert len(optimizer.state_dict()["state"]) == 4


@pytest.mark.parametrize("replaced", ["optimizer", "base_optimizer"])
def test_groups_that_are_replaced_are_so_for_both(replaced: str) -> None:
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.3, **SGD)
    target: Any = optimizer if replaced == "optimizer" else optimizer.base_optimizer
    target.param_groups = [{**group, "lr": 0.0} for group in target.param_groups]
    before = weights_of(model)
    train(model, optimizer, range(1))
    assert is_one(optimizer) and torch.equal(weights_of(model), before)


def test_a_group_that_the_base_optimizer_is_given_has_the_default_options() -> None:
    model, late = network(), nn.Linear(3, 3)
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.3, adaptive=True, **SGD)
    optimizer.base_optimizer.add_param_group({"params": late.parameters()})
    assert [(group["rho"], group["adaptive"]) for group in optimizer.param_groups] == [(0.3, True)] * 2
    before = weights_of(late)
    train(nn.Sequential(model, late), optimizer, range(1))
    assert not torch.equal(weights_of(late), before)


class Started(torch.optim.SGD):
    """An optimizer whose constructor makes its state."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1, momentum=0.9)
        for group in self.param_groups:
            for weight in group["params"]:
                self.state[weight]["momentum_buffer"] = torch.ones_like(weight)


@pytest.mark.parametrize("base", [Started, torch.optim.Adagrad, torch.optim.Adafactor])
def test_a_state_that_the_base_optimizer_starts_with_is_kept(base: Any) -> None:
    model, plain = network(), network()
    train(model, SAM(model.parameters(), base, rho=0.0), range(3))
    train_plain(plain, base(plain.parameters()), range(3))
    assert torch.equal(weights_of(model), weights_of(plain))


def train_plain(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for i in steps:
        optimizer.zero_grad()
        closure_on(model, i)()
        optimizer.step()


# ---- Loaded ----


def grouped(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": model[0].parameters(), "rho": 0.4, "adaptive": True}, {"params": model[2].parameters()}]


@pytest.mark.parametrize("through", ["optimizer", "base_optimizer"])
def test_a_checkpoint_of_the_base_optimizer_keeps_the_options_of_each_group(through: str) -> None:
    model = network()
    plain = torch.optim.SGD([{"params": part.parameters()} for part in (model[0], model[2])], **SGD)
    train_plain(model, plain, range(2))
    optimizer = SAM(grouped(model), torch.optim.SGD, rho=0.2, lr=0.7)
    target: Any = optimizer if through == "optimizer" else optimizer.base_optimizer
    target.load_state_dict(plain.state_dict())
    groups = optimizer.base_optimizer.param_groups
    assert [(group["rho"], group["adaptive"], group["normalize"]) for group in groups] == [
        (0.4, True, True),
        (0.2, False, True),
    ]
    assert is_one(optimizer) and len(optimizer.state_dict()["state"]) == 4 and groups[0]["momentum"] == 0.9

    twin = network()
    twin.load_state_dict(model.state_dict())
    expected = SAM(grouped(twin), torch.optim.SGD, rho=0.2, **SGD)
    for weight, values in zip(twin.parameters(), plain.state.values(), strict=True):
        expected.state[weight] = copy.deepcopy(values)
    train(model, optimizer, range(2, 4))
    train(twin, expected, range(2, 4))
    assert torch.equal(weights_of(model), weights_of(twin))


@pytest.mark.parametrize("through", ["optimizer", "base_optimizer"])
def test_a_scheduler_acts_on_what_was_loaded_into_the_base_optimizer(through: str) -> None:
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, **SGD)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step == 0))
    target: Any = optimizer if through == "optimizer" else optimizer.base_optimizer
    target.load_state_dict(target.state_dict())
    train(model, optimizer, range(1))
    scheduler.step()
    before = weights_of(model)
    train(model, optimizer, range(1, 2))
    assert optimizer.base_optimizer.param_groups[0]["lr"] == 0 and torch.equal(weights_of(model), before)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copy_keeps_options_and_groups_in_one_too(duplicate: Callable[[Any], Any]) -> None:
    model, optimizer = duplicate((model := network(), SAM(grouped(model), torch.optim.SGD, **SGD)))
    plain = torch.optim.SGD([{"params": part.parameters()} for part in (model[0], model[2])], lr=0.5)
    optimizer.base_optimizer.load_state_dict(plain.state_dict())
    assert is_one(optimizer) and optimizer.base_optimizer.param_groups[0]["rho"] == 0.4
    train(model, optimizer, range(2))


@pytest.mark.parametrize("kept", ["old_p", "e_w"])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_another_implementation_of_sam_is_continued(kind: type[SAM], base: Any, kept: str) -> None:
    """Such a one has copies of the weights, or epsilon, in its state, and nothing of its base optimizer."""
    model = network()
    optimizer = kind(model.parameters(), base, lr=0.01)
    state = {i: {kept: weight.detach().clone()} for i, weight in enumerate(model.parameters())}
    group = {**optimizer.state_dict()["param_groups"][0], "rho": 0.3}
    del group["normalize"]
    optimizer.load_state_dict({"state": state, "param_groups": [group]})
    train(model, optimizer, range(2))
    twin = network()
    train(twin, kind(twin.parameters(), base, rho=0.3, lr=0.01), range(2))
    assert torch.equal(weights_of(model), weights_of(twin))
    assert not any(kept in values for values in optimizer.state.values())


def test_a_checkpoint_that_has_the_state_of_the_base_optimizer_apart_is_continued() -> None:
    model, twin = network(), network()
    plain = torch.optim.Adam(model.parameters(), lr=0.01)
    train_plain(model, plain, range(2))
    twin.load_state_dict(model.state_dict())
    inner = plain.state_dict()
    outer = {"state": {i: {"gv": torch.ones(1)} for i in range(4)}, "param_groups": inner["param_groups"]}
    results = []
    for each, state in ((model, inner), (twin, {**outer, "base_optimizer": inner})):
        optimizer = SAM(each.parameters(), torch.optim.Adam)
        optimizer.load_state_dict(copy.deepcopy(state))
        train(each, optimizer, range(2, 4))
        results.append(weights_of(each))
    assert torch.equal(*results)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("saved", KINDS)
@pytest.mark.parametrize("loaded", KINDS)
def test_each_kind_goes_on_from_a_checkpoint_of_each(saved: type[SAM], loaded: type[SAM], base: Any) -> None:
    model = network()
    optimizer = saved(model.parameters(), base, lr=0.01)
    train(model, optimizer, range(2))
    other = loaded(model.parameters(), base, lr=0.01)
    other.load_state_dict(optimizer.state_dict())
    train(model, other, range(2, 4))
    assert weights_of(model).isfinite().all()
    own = {FriendlySAM: "mean_gradient", SAMPa: "ahead"}.get(loaded)
    assert {"mean_gradient", "ahead"} & {name for values in other.state.values() for name in values} <= {own}


class OwnFormat(torch.optim.SGD):
    """An optimizer with a format of its own, as those with states of 8 bits have."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "format": 8}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert state_dict["format"] == 8
        super().load_state_dict(state_dict)


def test_the_base_optimizer_saves_and_loads_in_its_own_way() -> None:
    model = network()
    optimizer = SAM(model.parameters(), OwnFormat, **SGD)
    train(model, optimizer, range(2))
    state = optimizer.state_dict()
    assert state["format"] == 8
    optimizer.load_state_dict(state)
    assert is_one(optimizer)


# ---- Saved and loaded by torch.distributed.checkpoint ----


@pytest.mark.parametrize("through", ["optimizer", "base_optimizer"])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("kind", KINDS)
def test_torch_distributed_checkpoint_resumes_bit_for_bit(kind: type[SAM], base: Any, through: str) -> None:
    def start(lr: float) -> tuple[nn.Module, SAM, Any]:
        model = network()
        optimizer = kind(model.parameters(), base, rho=0.1, lr=lr)
        return model, optimizer, optimizer if through == "optimizer" else optimizer.base_optimizer

    model, optimizer, target = start(0.01)
    train(model, optimizer, range(3))
    optimizer.zero_grad()
    saved = copy.deepcopy((model.state_dict(), get_optimizer_state_dict(model, target)))
    train(model, optimizer, range(3, 5))
    resumed, optimizer, target = start(0.5)
    resumed.load_state_dict(saved[0])
    set_optimizer_state_dict(resumed, target, saved[1])
    train(resumed, optimizer, range(3, 5))
    assert torch.equal(weights_of(resumed), weights_of(model))


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_before_the_first_step_changes_no_more_than_that_of_the_base_optimizer(
    kind: type[SAM], base: Any
) -> None:
    def trained(first: str | None) -> Tensor:
        model = network()
        optimizer = kind(model.parameters(), base, rho=0.1, lr=0.01)
        before = weights_of(model)
        if first == "save":
            get_optimizer_state_dict(model, optimizer)
        if first == "save and load":
            set_optimizer_state_dict(model, optimizer, get_optimizer_state_dict(model, optimizer))
        if first == "base":  # torch counts its making of Adam's state as a step
            get_optimizer_state_dict(model, optimizer.base_optimizer)
        assert torch.equal(weights_of(model), before) and optimizer.param_groups[0]["lr"] == 0.01
        train(model, optimizer, range(3))
        return weights_of(model)

    assert torch.equal(trained("save"), trained("base"))
    assert torch.equal(trained("save and load"), trained("base"))
    if base is torch.optim.SGD:
        assert torch.equal(trained("save"), trained(None))


def test_a_step_without_a_closure_is_refused_unless_it_can_change_nothing() -> None:
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.0)
    closure_on(model, 0)()
    with pytest.raises(ValueError, match="closure must be a function"):
        optimizer.step()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    with pytest.raises(ValueError, match="closure must be a function"):
        optimizer.step()


# ---- Weights that have only one of the two gradients ----


class Routed(nn.Module):
    """Hard routing, by lot: a weight may have a gradient in one pass of a step only."""

    ROUTES = torch.randint(0, 2, (40,), generator=torch.Generator().manual_seed(0)).tolist()

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Linear(6, 6)
        self.experts = nn.ModuleList(nn.Linear(6, 3) for _ in range(2))
        self.register_buffer("passes", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        expert = self.experts[self.ROUTES[int(self.passes)]]
        self.passes += 1
        return expert(self.shared(x))


@pytest.mark.parametrize("base", [getattr(torch.optim, name) for name in ("SGD", "Adam", "AdamW", "RMSprop", "NAdam")])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_with_a_gradient_in_some_passes_only_train_on_and_resume(kind: type[SAM], base: Any) -> None:
    def start() -> tuple[nn.Module, SAM]:
        model = Routed()
        return model, kind(model.parameters(), base, rho=0.5, lr=0.05)

    straight, optimizer = start()
    train(straight, optimizer, range(6))
    assert optimizer.skipped == 0
    broken, optimizer = start()
    train(broken, optimizer, range(3))
    resumed, other = start()
    resumed.load_state_dict(broken.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(resumed, other, range(3, 6))
    assert torch.equal(weights_of(resumed), weights_of(straight))


def test_the_running_mean_of_a_weight_without_a_second_gradient_is_kept() -> None:
    weight, other = nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.ones(2))
    optimizer = FriendlySAM([weight, other], torch.optim.Adam, rho=0.1, lmbda=0.9, lr=0.1)
    passes = iter([True, False, True, False, True, True])

    def closure() -> Tensor:
        return backward(other.square().sum() + (weight.square().sum() if next(passes) else 0))

    optimizer.step(closure)
    assert torch.equal(optimizer.state[weight]["mean_gradient"], 2 * weight.detach())
    optimizer.step(closure)
    torch.testing.assert_close(optimizer.state[weight]["mean_gradient"], 2 * weight.detach(), rtol=1e-12, atol=0)
    assert "exp_avg" not in optimizer.state[weight] and "exp_avg" in optimizer.state[other]
    optimizer.step(closure)
    assert optimizer.state[weight]["step"] == 1 and optimizer.state[other]["step"] == 3


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_half_precision_go_on_from_a_checkpoint(kind: type[SAM]) -> None:
    torch.set_default_dtype(torch.float32)
    model = network().bfloat16()

    def closure() -> Tensor:
        return backward(model(torch.ones(4, 6, dtype=torch.bfloat16)).square().mean())

    optimizer = kind(model.parameters(), torch.optim.SGD, **SGD)
    second = [closure] if kind in (AgnosticSAM, SAMPa) else []
    optimizer.step(closure, *second)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step(closure, *second)
    assert optimizer.skipped == 0


# ---- Between first_step and second_step ----


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, optimizer: optimizer.state_dict(), "state_dict was called between first_step and second_step"),
        (
            lambda model, optimizer: optimizer.load_state_dict(torch.optim.SGD(model.parameters()).state_dict()),
            "load_state_dict was called between first_step",
        ),
        (lambda model, optimizer: copy.deepcopy(optimizer), "the optimizer was copied or pickled between first_step"),
        (lambda model, optimizer: pickle.dumps(optimizer), "the optimizer was copied or pickled between first_step"),
        (lambda model, optimizer: model.state_dict(), "the model was saved or loaded between first_step"),
        (lambda model, optimizer: nn.ModuleList([model]).state_dict(), "the model was saved or loaded between"),
        (lambda model, optimizer: pickle.dumps(model), "the model was saved or loaded between first_step"),
        (lambda model, optimizer: pickle.dumps(copy.deepcopy(model)), "the model was saved or loaded between"),
        (lambda model, optimizer: model.load_state_dict(network().state_dict()), "the model was saved or loaded"),
    ],
)
def test_perturbed_weights_are_neither_saved_nor_overwritten(call: Callable[..., Any], message: str) -> None:
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, model=model, **SGD)
    before = weights_of(model)
    closure_on(model, 0)()
    optimizer.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match=message + ".*; call second_step before it"):
        call(model, optimizer)
    optimizer.second_step()  # without a gradient: back at the weights
    assert torch.equal(weights_of(model), before)
    call(model, optimizer)
