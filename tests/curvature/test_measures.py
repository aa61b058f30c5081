"""Every measure against an independent truth in float64: dense matrices, closed forms, exhaustive search."""

import math

import pytest
import torch
import torch.nn.functional as F
from models import network, prepared, samples
from oracles import dense_hessian, dense_hessians
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop

import samlite
from samlite import SAM, Hessian
from samlite.curvature.measures.table import MEASURES

pytestmark = pytest.mark.usefixtures("float64")
CRITERION = nn.CrossEntropyLoss()


def dense(model, x, y):
    return dense_hessian(model, lambda call: CRITERION(call(x), y))


def flat_gradient(model, x, y):
    parts = torch.autograd.grad(CRITERION(model(x), y), list(model.parameters()))
    return torch.cat([part.reshape(-1) for part in parts])


def weights_of(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def stepped(model, x, y, optimizer, steps=3):
    for _ in range(steps):

        def closure():
            optimizer.zero_grad()
            loss = CRITERION(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)


def one(name, model, x, y, **options):
    return Hessian(model, CRITERION, (x, y)).measures(name, **options)[name]


# --- Preconditioned curvature

DIAGONALS = {
    "Adam": (
        lambda p: Adam(p, 0.01, (0.8, 0.95), eps=1e-3),
        lambda s, t: (1 - 0.8**t) * ((s["exp_avg_sq"] / (1 - 0.95**t)).sqrt() + 1e-3),
    ),
    "amsgrad": (
        lambda p: Adam(p, 0.01, (0.8, 0.95), eps=1e-3, amsgrad=True),
        lambda s, t: (1 - 0.8**t) * ((s["max_exp_avg_sq"] / (1 - 0.95**t)).sqrt() + 1e-3),
    ),
    "AdamW in SAM": (
        lambda p: SAM(p, AdamW, lr=0.01, betas=(0.8, 0.95), eps=1e-3),
        lambda s, t: (1 - 0.8**t) * ((s["exp_avg_sq"] / (1 - 0.95**t)).sqrt() + 1e-3),
    ),
    "RMSprop": (
        lambda p: RMSprop(p, 0.01, alpha=0.9, eps=1e-3, centered=True),
        lambda s, t: (s["square_avg"] - s["grad_avg"] ** 2).sqrt() + 1e-3,
    ),
    "Adagrad": (
        lambda p: Adagrad(p, 0.1, lr_decay=0.1, eps=1e-3),
        lambda s, t: (s["sum"].sqrt() + 1e-3) * (1 + (t - 1) * 0.1),
    ),
}


@pytest.mark.parametrize(("make", "diagonal"), DIAGONALS.values(), ids=DIAGONALS)
def test_preconditioned_curvature_is_that_of_the_dense_matrix(make, diagonal):
    model, (x, y) = network(), samples()
    optimizer = make(model.parameters())
    stepped(model, x, y, optimizer)
    state = optimizer.state
    P = torch.cat([diagonal(state[p], 3).reshape(-1) for p in model.parameters()])  # noqa: N806
    right = P.rsqrt().diag() @ dense(model, x, y) @ P.rsqrt().diag()
    found = Hessian(model, CRITERION, (x, y)).preconditioned(optimizer)
    v = torch.randn(len(P))
    torch.testing.assert_close(found @ v, right @ v, rtol=1e-10, atol=1e-10)
    values = found.eigenvalues(3, tol=1e-9)
    torch.testing.assert_close(values.values, torch.linalg.eigvalsh(right).flip(0)[:3], rtol=1e-8, atol=1e-8)
    trace = found.trace(1e-3)
    assert abs(trace.value - float(right.trace())) <= 4 * trace.stderr + 1e-9
    assert found.density(0.5).converged


def test_the_diagonal_that_is_divided_by_is_that_of_the_step():
    """One more step of Adam with the momentum of the state is -lr P^-1 m."""
    model, (x, y) = network(), samples()
    optimizer = Adam(model.parameters(), 0.01)
    stepped(model, x, y, optimizer)
    before = weights_of(model)
    stepped(model, x, y, optimizer, steps=1)
    moments = torch.cat([optimizer.state[p]["exp_avg"].reshape(-1) for p in model.parameters()])
    from samlite.curvature.preconditioner import preconditioner

    P = preconditioner(optimizer, list(model.parameters()))  # noqa: N806
    torch.testing.assert_close(before - weights_of(model), 0.01 * moments / P, rtol=1e-9, atol=1e-12)


def test_preconditioned_blocks_and_diagonals_of_ones_own():
    model, (x, y) = network(), samples()
    optimizer = Adam(model.parameters(), 0.01)
    stepped(model, x, y, optimizer)
    h = Hessian(model, CRITERION, (x, y))
    d = torch.rand(h.shape[0]) + 0.5
    right = d.rsqrt().diag() @ (dense(model, x, y) + 0.3 * torch.eye(len(d))) @ d.rsqrt().diag()
    v = torch.randn(len(d))
    torch.testing.assert_close(h.preconditioned(d, decay=0.3) @ v, right @ v)
    blocks = h.blocks(by=optimizer)
    for name, block in blocks.items():
        alone = h.restricted(f"{name}.*").preconditioned(optimizer).eigenvalues(1)
        assert float(block.eigenvalues.values[0]) == pytest.approx(float(alone.values[0]), rel=2e-3)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda p: SGD(p, 0.1), "optimizer must be Adam, AdamW, RMSprop or Adagrad, or SAM around one, got SGD"),
        (lambda p: Adam(p), "optimizer must have taken a step with every measured parameter"),
        (lambda p: Adagrad(p), "optimizer must have taken a step"),
        (lambda p: Adam(p[:1]), "optimizer must hold all measured parameters"),
    ],
)
def test_an_optimizer_without_a_diagonal_is_refused(make, line):
    model, (x, y) = network(), samples()
    with pytest.raises(samlite.UsageError, match=line):
        Hessian(model, CRITERION, (x, y)).preconditioned(make(list(model.parameters())))


# --- Along steps

UPDATES = {
    "momentum": lambda p: SGD(p, 0.05, momentum=0.9, weight_decay=0.01),
    "Nesterov": lambda p: SGD(p, 0.05, momentum=0.9, nesterov=True),
    "AdamW": lambda p: AdamW(p, 0.01, weight_decay=0.1),
    "SAM": lambda p: SAM(p, SGD, rho=0.2, lr=0.05, momentum=0.9),
    "ASAM": lambda p: SAM(p, SGD, rho=0.5, adaptive=True, lr=0.05),
}


@pytest.mark.parametrize("make", UPDATES.values(), ids=UPDATES)
def test_directional_sharpness_is_along_the_step_that_is_then_taken(make):
    model, (x, y) = network(), samples()
    optimizer = make(model.parameters())
    stepped(model, x, y, optimizer)
    found = one("directional", model, x, y, optimizer=optimizer)
    H, g, before = dense(model, x, y), flat_gradient(model, x, y), weights_of(model)  # noqa: N806
    stepped(model, x, y, optimizer, steps=1)
    step = before - weights_of(model)
    lr = optimizer.param_groups[0]["lr"]
    assert found.value == pytest.approx(float(step @ H @ step / (step @ g)) / lr, rel=1e-6)
    assert found.kind == "exact" and found.error == 0


def test_without_an_optimizer_the_direction_is_the_gradient():
    model, (x, y) = network(), samples()
    H, g = dense(model, x, y), flat_gradient(model, x, y)  # noqa: N806
    assert one("directional", model, x, y).value == pytest.approx(float(g @ H @ g / (g @ g)), rel=1e-9)


class Bowl(nn.Module):
    def __init__(self, curvature):
        super().__init__()
        self.w, self.curvature = nn.Parameter(torch.ones(len(curvature))), torch.tensor(curvature)

    def forward(self, x):
        return (self.curvature * self.w.square()).sum() / 2 + 0 * x.sum()


def bowl(curvature=(3.0, 1.0, 0.5)):
    model = Bowl(list(curvature))
    return model, Hessian(model, lambda model, batch: model(batch[0]), [(torch.zeros(4, 1), torch.zeros(4))])


@pytest.mark.parametrize("lr", [0.01, 0.5, 30.0])
def test_critical_sharpness_of_a_quadratic_is_its_directional_sharpness(lr):
    _, h = bowl()
    d = torch.tensor([3.0, 1.0, 0.5])
    right = float((d**3).sum() / (d**2).sum())  # of g = d
    found = h.measures("critical,directional", lr=lr)
    assert found["directional"].value == pytest.approx(right, rel=1e-9)
    critical = found["critical"]
    assert abs(critical.value - right) <= critical.error <= right / 16 and critical.kind == "bound"


@pytest.mark.parametrize("runs", [2, pytest.param(200, marks=pytest.mark.slow)])
def test_batch_sharpness_covers_the_mean_over_all_batches(runs):
    model, (x, y) = network(), samples(6)
    h = Hessian(model, CRITERION, (x, y))
    hessians = dense_hessians(model, CRITERION, x, y)
    gradients = torch.stack([flat_gradient(model, x[i : i + 1], y[i : i + 1]) for i in range(6)])
    pairs = [(i, j) for i in range(6) for j in range(i)]
    quotients = []
    for i, j in pairs:
        H, g = (hessians[i] + hessians[j]) / 2, (gradients[i] + gradients[j]) / 2  # noqa: N806
        quotients.append(float(g @ H @ g / (g @ g)))
    right, inside = sum(quotients) / len(quotients), 0
    for seed in range(runs):
        found = h.measures("batch", batch_size=2, seed=seed)["batch"]
        inside += abs(found.value - right) <= 3 * found.error
    assert inside >= 0.95 * runs
    whole = h.measures("batch,directional", batch_size=100)
    assert whole["batch"].value == pytest.approx(whole["directional"].value, rel=1e-9)
    assert whole["batch"].error < 1e-9


def test_batch_sharpness_of_gauss_newton_matrices():
    model, (x, y) = network(), samples(6)
    h = Hessian(model, CRITERION, (x, y), curvature="ggn")
    g = flat_gradient(model, x, y)
    assert h.measures("batch", batch_size=6)["batch"].value == pytest.approx(float(g @ (h @ g) / (g @ g)), rel=1e-9)


# --- Eigenvectors


def test_alignment_and_participation_are_those_of_dense_eigenvectors():
    model, (x, y) = network(), samples()
    values, vectors = torch.linalg.eigh(dense(model, x, y))
    g = flat_gradient(model, x, y)
    found = Hessian(model, CRITERION, (x, y)).measures("alignment,participation,sharpness", k=3, tol=1e-8)
    right = float((vectors[:, -3:].T @ g).square().sum() / (g @ g))
    assert found["alignment"].value == pytest.approx(right, rel=1e-6)
    assert abs(found["alignment"].value - right) <= found["alignment"].error + 1e-12
    assert found["participation"].value == pytest.approx(float(vectors[:, -1].pow(4).sum()), rel=1e-6)
    assert found["sharpness"].value == pytest.approx(float(values[-1]), rel=1e-8)


def test_errors_of_eigenvector_measures_are_bounds():
    model, (x, y) = network(), samples()
    _, vectors = torch.linalg.eigh(dense(model, x, y))
    g = flat_gradient(model, x, y)
    right = float((vectors[:, -2:].T @ g).square().sum() / (g @ g))
    for seed in range(20):
        found = Hessian(model, CRITERION, (x, y)).measures("alignment,participation", k=2, tol=0.1, seed=seed)
        assert abs(found["alignment"].value - right) <= found["alignment"].error
        fourth = float(vectors[:, -1].pow(4).sum())
        assert abs(found["participation"].value - fourth) <= found["participation"].error


def test_overlap_of_two_checkpoints():
    model, (x, y) = network(), samples()
    other = network()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1 * torch.randn_like(p))
    (_, first), (_, second) = (torch.linalg.eigh(dense(m, x, y)) for m in (model, other))
    right = float((first[:, -2:].T @ second[:, -2:]).square().sum()) / 2
    h = Hessian(model, CRITERION, (x, y))
    beside = Hessian(other, CRITERION, (x, y))
    found = h.measures("overlap", k=2, other=beside, tol=1e-8)["overlap"]
    assert found.value == pytest.approx(right, rel=1e-6) and abs(found.value - right) <= found.error + 1e-12
    assert h.measures("overlap", k=2, other=h)["overlap"].value == pytest.approx(1, rel=1e-9)


# --- Nearby losses


def test_worst_case_of_a_quadratic_in_closed_form():
    """Without a gradient the worst step of length r costs r^2 lambda_max / 2; the worst of a box is its corner."""
    model, h = bowl()
    with torch.no_grad():
        model.w.zero_()
    found = h.measures("worst,worst-inf,average", radius=0.1)
    assert found["worst"].value == pytest.approx(0.01 * 3 / 2, rel=1e-6)
    assert found["worst-inf"].value == pytest.approx(0.01 * 4.5 / 2, rel=1e-9)
    assert found["worst"].kind == "at least"
    assert abs(found["average"].value - 0.01 * 4.5 / 2) <= 3 * found["average"].error


def test_adaptive_steps_are_relative_to_the_weights():
    model, h = bowl()
    with torch.no_grad():
        model.w.copy_(torch.tensor([0.0, 2.0, 1.0]))  # the first one cannot move
    found = h.measures("worst-inf-adaptive,average-adaptive", radius=0.1)
    right = (1.0 * (2.2**2 - 4) + 0.5 * (1.1**2 - 1)) / 2
    assert found["worst-inf-adaptive"].value == pytest.approx(right, rel=1e-9)
    mean = 0.01 * (1.0 * 4 + 0.5 * 1) / 2
    assert abs(found["average-adaptive"].value - mean) <= 3 * found["average-adaptive"].error


@pytest.mark.parametrize("runs", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_average_case_covers_a_quadratics_mean_in_95_percent(runs):
    inside = 0
    _, h = bowl((5.0, 0.1, 0.1, 0.05))
    right = 0.01 * 5.25 / 2
    for seed in range(runs):
        found = h.measures("average", radius=0.1, seed=seed)["average"]
        inside += abs(found.value - right) <= 3 * found.error
    assert inside >= 0.95 * runs


def rises(model, x, y, steps):
    """The rises of the loss by many steps (n, p)."""
    named = dict(model.named_parameters())

    def loss(step):
        parts = step.split([p.numel() for p in named.values()])
        moved = {name: p + part.view(p.shape) for (name, p), part in zip(named.items(), parts, strict=True)}
        return CRITERION(torch.func.functional_call(model, moved, x), y)

    with torch.no_grad():
        return torch.vmap(loss)(steps) - CRITERION(model(x), y)


@pytest.mark.parametrize("seed", [0, 1, pytest.param(range(2, 20), marks=pytest.mark.slow)])
def test_apgd_finds_at_least_what_random_steps_and_a_gradient_step_find(seed):
    for number in [seed] if isinstance(seed, int) else seed:
        torch.manual_seed(number)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        x, y = torch.randn(12, 4), torch.randint(0, 3, (12,))
        h, radius = Hessian(model, CRITERION, (x, y)), 0.3
        found = h.measures("worst,worst-inf,worst-adaptive", radius=radius)
        g, w, p = flat_gradient(model, x, y), weights_of(model), h.shape[0]
        noise = torch.randn(2000, p)
        ball = radius * noise / noise.norm(dim=1, keepdim=True)
        box = radius * (2 * torch.rand(2000, p) - 1)
        exact = {"worst": radius * g / g.norm(), "worst-inf": radius * g.sign()}
        c = w.abs()
        exact["worst-adaptive"] = radius * c * c * g / (c * g).norm()
        steps = {"worst": ball, "worst-inf": torch.cat([box[:1000], radius * box[1000:].sign()])}
        steps["worst-adaptive"] = ball * c
        for name, own in exact.items():
            largest = float(rises(model, x, y, torch.cat([own[None], steps[name]])).max())
            assert found[name].value >= largest * (1 - 1e-9), name


def test_groups_of_m_samples_have_a_worst_step_each():
    model, (x, y) = network(), samples(4)
    h = Hessian(model, CRITERION, (x, y))
    each = [Hessian(model, CRITERION, (x[i : i + 1], y[i : i + 1])) for i in range(4)]
    alone = [one_of.measures("worst", radius=0.2)["worst"].value for one_of in each]
    assert h.measures("worst", radius=0.2, batch_size=1)["worst"].value == pytest.approx(sum(alone) / 4, rel=1e-3)


# --- Norms


def test_relative_flatness_is_its_double_sum():
    model, (x, y) = network(), samples()
    W = model[2].weight.detach()  # noqa: N806
    H = dense_hessian(model, lambda call: CRITERION(call(x), y), ["2.weight"]).view(3, 5, 3, 5)  # noqa: N806
    right = sum(float(W[s] @ W[t]) * float(torch.einsum("jj->", H[s, :, t, :])) for s in range(3) for t in range(3))
    inside = 0
    for seed in range(20):
        found = one("relative-flatness", model, x, y, seed=seed)
        assert found.note == "of 2.weight" and found.kind == "standard error"
        inside += abs(found.value - right) <= 3 * found.error + 1e-6 * abs(right)
    assert inside >= 19


@pytest.mark.parametrize("name", ["MLP", "CNN with batch norm and residuals", "LSTM", "functions of parameters"])
def test_fisher_rao_norm_is_the_mean_square_of_slopes_along_the_weights(name):
    model, x, y = prepared(name)
    w = weights_of(model)
    slopes = []
    for i in range(len(x)):
        loss = CRITERION(model(x[i : i + 1]), y[i : i + 1])
        parts = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
        slopes.append(torch.cat([part.reshape(-1) for part in parts]) @ w)
    right = float(torch.stack(slopes).square().mean())
    assert one("fisher-rao", model, x, y).value == pytest.approx(right, rel=1e-9)


def test_fisher_rao_norm_of_a_relu_network_without_biases_has_a_closed_form():
    """With L layers <w, dl/dw> = L <f, dl/df>, since f is homogeneous of degree 1 in each layer's weights."""
    torch.manual_seed(0)
    layers = [
        nn.Linear(4, 6, bias=False),
        nn.ReLU(),
        nn.Linear(6, 5, bias=False),
        nn.ReLU(),
        nn.Linear(5, 3, bias=False),
    ]
    model, (x, y) = nn.Sequential(*layers), samples()
    f = model(x)
    slopes = 3 * (f.softmax(1) * f).sum(1) - 3 * f[range(len(y)), y]
    assert one("fisher-rao", model, x, y).value == pytest.approx(slopes.square().mean().item(), rel=1e-9)


class Odd(nn.Module):
    """A weight that no per-sample rule covers, even as a copy."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        return torch.stack([x[i] @ self.w * float(len(x) > 0) for i in range(len(x))])


@pytest.mark.filterwarnings("ignore:no per-sample rule")
def test_slopes_without_a_rule_are_taken_one_by_one():
    model, (x, y) = Odd(), samples()
    g = torch.stack([flat_gradient(model, x[i : i + 1], y[i : i + 1]) for i in range(len(x))])
    v = torch.randn(12)
    torch.testing.assert_close(Hessian(model, CRITERION, (x, y)).sample_slopes(v), g @ v)


def test_pac_bayes_noise_costs_a_tenth_of_the_accuracy():
    torch.manual_seed(0)
    x = torch.randn(400, 2)
    y = (x[:, 0] > 0).long()
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
    found = one("pac-bayes", model, x, y)
    drops = []
    generator = torch.Generator().manual_seed(99)
    for _ in range(2000):
        noisy = model.weight.detach() + found.value * torch.randn(2, 2, generator=generator)
        drops.append(1 - float(((x @ noisy.T).argmax(1) == y).double().mean()))
    slope = 0.1 / found.value  # the order of what a change of sigma costs
    assert abs(sum(drops) / 2000 - 0.1) <= 4 * found.error * slope


# --- The table


def test_all_measures_at_once_say_why_one_does_not_apply_and_leave_the_model_alone():
    model, (x, y) = network(), samples()
    before, h = weights_of(model), Hessian(model, CRITERION, (x, y))
    versions = [p._version for p in model.parameters()]
    found = h.measures("all", lr=0.1)
    assert list(found) == list(MEASURES)
    reasons = {name: m.note for name, m in found.items() if math.isnan(m.value)}
    assert reasons == {
        "preconditioned": "needs an optimizer that preconditions: Adam, AdamW, RMSprop or Adagrad",
        "sam-edge": "needs rho, or an optimizer of the SAM family",
        "overlap": "needs another checkpoint of the same network (other)",
        "pac-bayes": "noise of 2 costs less than 0.1 of the accuracy",  # which is that of chance here
    }
    assert torch.equal(weights_of(model), before) and versions == [p._version for p in model.parameters()]
    assert found["edge"].value == pytest.approx(20)
    for m in found.values():
        assert m.meaning and m.gradient_evaluations >= 0


def test_measures_of_regression_have_no_classes():
    model = nn.Linear(3, 1)
    h = Hessian(model, nn.MSELoss(), (torch.randn(8, 3), torch.randn(8, 1)))
    assert "integer labels" in h.measures("pac-bayes")["pac-bayes"].note


def test_sam_edge_is_that_of_its_formula():
    model, (x, y) = network(), samples()
    norm = float(flat_gradient(model, x, y).norm())
    right = norm / (2 * 0.05) * (math.sqrt(1 + 8 * 0.05 / (0.1 * norm)) - 1)
    assert one("sam-edge", model, x, y, lr=0.1, rho=0.05).value == pytest.approx(right, rel=1e-9)
    optimizer = SAM(model.parameters(), SGD, rho=0.05, lr=0.1)
    assert one("sam-edge", model, x, y, optimizer=optimizer).value == pytest.approx(right, rel=1e-9)
    assert one("edge", model, x, y, optimizer=optimizer).value == pytest.approx(right, rel=1e-9)


@pytest.mark.parametrize(
    ("names", "options", "line"),
    [
        ("flatness", {}, "measures must be of sharpness, edge, .*, or all, got 'flatness'"),
        ("batch", {"lr": 0}, "lr must be > 0, got 0"),
        ("batch", {"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ("worst", {"radius": -1}, "radius must be > 0, got -1"),
        ("alignment", {"k": 0}, "k must be >= 1, got 0"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(names, options, line):
    model, (x, y) = network(), samples()
    with pytest.raises(samlite.UsageError, match=line):
        Hessian(model, CRITERION, (x, y)).measures(names, **options)


def test_a_move_keeps_graphs_valid():
    """Losses at other weights do not make the Hessian build its graphs anew, nor change what they give."""
    model, (x, y) = network(), samples()
    h = Hessian(model, CRITERION, (x, y))
    v = torch.randn(h.shape[0])
    first = h @ v
    operator = h._operator
    h.moved().loss(torch.ones(h.shape[0]))
    assert torch.equal(h @ v, first) and h._operator is operator
    shifted = network()
    with torch.no_grad():
        for p in shifted.parameters():
            p.add_(1.0)
    assert h.moved().loss(torch.ones(h.shape[0])) == pytest.approx(F.cross_entropy(shifted(x), y).item())
    torch.testing.assert_close(h.moved().gradient(torch.ones(h.shape[0])), flat_gradient(shifted, x, y))
