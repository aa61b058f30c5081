"""The edges of optimizers, on quadratics: what is 2 % below shrinks, what is 2 % above grows."""

import math

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop

import samlite
from samlite import SAM

pytestmark = pytest.mark.usefixtures("float64")


class Bowl(nn.Module):
    """f = curvature w^2 / 2."""

    def __init__(self, curvature: float, start: float = 1.0) -> None:
        super().__init__()
        self.w, self.curvature = nn.Parameter(torch.tensor([start])), curvature

    def forward(self) -> torch.Tensor:
        return self.curvature * self.w.square().sum() / 2


def size_after(curvature, make, steps=400, freeze=None):
    """The size of the iterate after many steps, over that of some steps in, when momentum has settled."""
    model = Bowl(curvature, start=1e-8)  # small, so that no diagonal moves
    optimizer = make([model.w])
    early = 0.0
    for i in range(steps):

        def closure():
            optimizer.zero_grad()
            loss = model()
            loss.backward()
            return loss

        if freeze:
            freeze(optimizer, model.w)
        optimizer.step(closure)
        if i < steps // 2:
            early = max(early, abs(model.w.item())) if i > steps // 4 else 0.0
    late = 0.0
    for _ in range(40):
        if freeze:
            freeze(optimizer, model.w)
        optimizer.step(closure)
        late = max(late, abs(model.w.item()))
    return late / early


PLAIN = {
    "gradient descent": lambda p: SGD(p, lr=0.1),
    "with weight decay": lambda p: SGD(p, lr=0.1, weight_decay=3.0),
    "Polyak": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=3.0),
    "Polyak with dampening": lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
    "Nesterov": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=3.0),
    "SAM, unnormalised": lambda p: SAM(p, SGD, rho=0.05, normalize=False, lr=0.1, weight_decay=3.0),
    "SAM around Polyak, unnormalised": lambda p: SAM(p, SGD, rho=0.05, normalize=False, lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN)
def test_iterates_shrink_below_and_grow_above_the_edge(make):
    edge = samlite.edges(make([nn.Parameter(torch.ones(1))]))
    assert edge.curvature == "hessian" and edge.decay == 0
    assert size_after(0.98 * edge.threshold, make) < 1
    assert size_after(1.02 * edge.threshold, make) > 1


def frozen(name, moment):
    """The diagonal of an adaptive optimizer stands still."""

    def freeze(optimizer, w):
        state = optimizer.state[w]
        if not state:  # let the optimizer make its own
            before = w.detach().clone()
            w.grad = torch.ones_like(w)
            optimizer.step()
            with torch.no_grad():
                w.copy_(before)
                for value in optimizer.state[w].values():
                    value.zero_()
        state = optimizer.state[w]
        state[name].fill_(moment)
        if "step" in state:
            state["step"].fill_(STEPS)

    return freeze


V = 0.04  # a second moment of 0.2^2
BETA, STEPS = 1 - 1e-15, 1e12  # hardly moved by a gradient; the correction is about 1e-3
ADAPTIVE = {
    "RMSprop": (lambda p: RMSprop(p, lr=0.1, alpha=1.0, eps=0.01), "square_avg"),
    "RMSprop with momentum and decay": (
        lambda p: RMSprop(p, lr=0.1, alpha=1.0, eps=0.01, momentum=0.9, weight_decay=1.5),
        "square_avg",
    ),
    "Adam": (lambda p: Adam(p, lr=0.1, betas=(0.9, BETA), eps=0.01), "exp_avg_sq"),
    "Adam with decay": (lambda p: Adam(p, lr=0.1, betas=(0.9, BETA), eps=0.01, weight_decay=5.0), "exp_avg_sq"),
    "AdamW": (lambda p: AdamW(p, lr=0.1, betas=(0.9, BETA), eps=0.01, weight_decay=2.0), "exp_avg_sq"),
}


@pytest.mark.parametrize(("make", "name"), ADAPTIVE.values(), ids=ADAPTIVE)
def test_adaptive_optimizers_have_the_edge_of_the_preconditioned_curvature(make, name):
    value = V * (1 - BETA**STEPS) if name == "exp_avg_sq" else V
    freeze = frozen(name, value)
    w = nn.Parameter(torch.ones(1))
    optimizer = make([w])
    freeze(optimizer, w)
    edge = samlite.edges(optimizer)
    assert edge.curvature == "preconditioned"
    diagonal = math.sqrt(V) + 0.01
    for share, grows in ((0.98, False), (1.02, True)):
        curvature = share * edge.threshold * diagonal - edge.decay
        assert (size_after(curvature, make, steps=40, freeze=freeze) > 1) == grows


def test_adagrad_shrinks_below_its_edge_and_grows_above_it_in_one_step():
    for share in (0.98, 1.02):
        model = Bowl(1.0)
        optimizer = Adagrad([model.w], lr=0.1, lr_decay=0.5)
        model().backward()
        optimizer.step()
        state = optimizer.state[model.w]
        state["sum"].fill_(1e8)  # so that the next gradient does not change it
        state["step"].fill_(4.0)
        edge = samlite.edges(optimizer)
        p_next = (1 + 4 * 0.5) * 1e4  # of the fifth step, which is the one that is taken
        model.curvature = share * edge.threshold * p_next
        state["sum"].fill_(1e8 - (model.curvature * model.w.item()) ** 2)
        before = abs(model.w.item())
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
        assert (abs(model.w.item()) > before) == (share > 1)


@pytest.mark.parametrize("decay", [0.0, 3.0])
def test_normalised_sam_has_the_sam_edge_of_its_gradient_norm(decay):
    for share in (0.98, 1.02):
        low, high = 1e-6, 1e6  # the curvature at which it is this share of the edge
        for _ in range(200):
            curvature = math.sqrt(low * high)
            optimizer = SAM([nn.Parameter(torch.ones(1))], SGD, rho=0.05, lr=0.1, weight_decay=decay)
            below = curvature < share * samlite.edges(optimizer, curvature * 1.0).threshold
            low, high = (curvature, high) if below else (low, curvature)
        model = Bowl(curvature)
        optimizer = SAM([model.w], SGD, rho=0.05, lr=0.1, weight_decay=decay)

        def closure(model=model):
            loss = model()
            loss.backward()
            return loss

        optimizer.step(closure)
        assert (abs(model.w.item()) > 1) == (share > 1)


def test_what_has_no_edge_is_refused_in_one_line():
    w = [nn.Parameter(torch.ones(1))]
    with pytest.raises(samlite.UsageError, match="gradient must be given for the edge of normalised SAM"):
        samlite.edges(SAM(w, SGD, rho=0.1, lr=0.1))
    with pytest.raises(samlite.UsageError, match="the edge of SAM is known around SGD, got Adam"):
        samlite.edges(SAM(w, Adam, rho=0.1, lr=0.1))
    with pytest.raises(samlite.UsageError, match="got Adamax, whose edge is not known"):
        samlite.edges(torch.optim.Adamax(w))
    with pytest.raises(samlite.UsageError, match="adaptive=False, got True"):
        samlite.edges(SAM(w, SGD, rho=0.1, adaptive=True, lr=0.1), 1.0)
    with pytest.raises(samlite.UsageError, match="optimizer must be a torch optimizer, got"):
        samlite.edges("adam")


def test_of_several_groups_the_least_stable_counts():
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = SGD([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.4}], lr=0.1)
    assert samlite.edges(optimizer).threshold == pytest.approx(5.0)


def test_adam_at_its_edge_on_a_network_is_38_over_lr():
    optimizer = Adam([nn.Parameter(torch.ones(1))], lr=0.01)
    assert samlite.edges(optimizer).threshold == pytest.approx(38 / 0.01)
