"""Per-sample Hessian chains, against dense per-sample Hessians in float64."""

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Waits
from models import CASES, WHOLE, prepared
from oracles import dense_gauss_newton, dense_hessian, dense_hessians, largest, moment
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from samlite import Hessian

ROUNDING = 1e-10  # relative; products of well-scaled matrices in float64 lose a few digits at most


pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("name", CASES)
def test_products_with_moments_are_those_of_dense_hessians(name):
    model, x, y = prepared(name)
    hessians = dense_hessians(model, nn.CrossEntropyLoss(), x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no fallback
        hessian = Hessian(model, nn.CrossEntropyLoss(), (x, y))
        v = torch.randn(hessian.shape[0])
        for order in range(1, 5):
            power = torch.linalg.matrix_power(hessians.mean(0), order)
            expected = moment(hessians, order) @ v - power @ v
            scale = (moment(hessians, order) @ v).norm()
            assert (hessian.moment_operator(order) @ v - expected).norm() <= ROUNDING * scale


@pytest.mark.parametrize("name", CASES)
def test_products_with_gauss_newton_moments_are_those_of_dense_matrices(name):
    model, x, y = prepared(name)
    matrices = dense_gauss_newton(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no fallback
        hessian = Hessian(model, nn.CrossEntropyLoss(), (x, y), curvature="ggn")
        v = torch.randn(hessian.shape[0])
        assert (hessian @ v - matrices.mean(0) @ v).norm() <= ROUNDING * (matrices.mean(0) @ v).norm()
        for order in range(1, 5):
            power = torch.linalg.matrix_power(matrices.mean(0), order)
            expected = moment(matrices, order) @ v - power @ v
            scale = (moment(matrices, order) @ v).norm()
            assert (hessian.moment_operator(order) @ v - expected).norm() <= ROUNDING * scale


@pytest.mark.parametrize("name", WHOLE)
def test_moments_are_the_top_eigenvalues_of_the_dense_matrices(name):
    model, x, y = prepared(name)
    hessians = dense_hessians(model, nn.CrossEntropyLoss(), x, y)
    mean = hessians.mean(0)
    found = Hessian(model, nn.CrossEntropyLoss(), (x, y)).moments(tol=1e-9)
    assert found.converged and found.fallback is None
    assert found.sharpness == pytest.approx(largest(mean), rel=1e-8)
    for k in (2, 3, 4):
        right = largest(moment(hessians, k) - torch.linalg.matrix_power(mean, k))
        assert abs(found.powers[k] - right) <= 1e-8 * largest(moment(hessians, k))
        assert abs(found.powers[k] - right) <= found.errors[k]
        assert found.nonuniformity[k] == pytest.approx(right ** (1 / k), rel=1e-8)


def test_moments_of_linear_regression_match_their_formula():
    x, y = torch.randn(20, 5), torch.randn(20, 1)
    model = nn.Linear(5, 1, bias=False)
    hessians = 2 * x[:, :, None] * x[:, None, :]  # of (w x - y)^2
    found = Hessian(model, nn.MSELoss(), (x, y)).moments(tol=1e-9)
    for k in (2, 3, 4):
        norms = (2 * x.square().sum(1)) ** (k - 1)
        formula = (norms[:, None, None] * hessians).mean(0) - torch.linalg.matrix_power(hessians.mean(0), k)
        assert found.powers[k] == pytest.approx(largest(formula), rel=1e-8)


def test_moments_of_batches_are_weighted_by_their_share():
    model, x, y = prepared("MLP")
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    hessians = dense_hessians(model, nn.CrossEntropyLoss(), x, y)
    parts = torch.stack([hessians[:4].mean(0), hessians[4:].mean(0)])
    share = torch.tensor([4 / 6, 2 / 6])[:, None, None]
    second = (share * torch.linalg.matrix_power(parts, 2)).sum(0) - torch.linalg.matrix_power(hessians.mean(0), 2)
    found = Hessian(model, nn.CrossEntropyLoss(), batches).moments(2, unit="batch", tol=1e-9)
    assert found.powers[2] == pytest.approx(largest(second), rel=1e-8)


def test_data_in_unequal_batches_and_chunks_give_the_same_moments():
    model, x, y = prepared("CNN with batch norm and residuals")
    whole = Hessian(model, nn.CrossEntropyLoss(), (x, y)).moment_operator(3)
    batched = Hessian(model, nn.CrossEntropyLoss(), [(x[:4], y[:4]), (x[4:], y[4:])]).moment_operator(3)
    tight = Hessian(model, nn.CrossEntropyLoss(), (x, y), memory=1).moment_operator(3)
    v = torch.randn(whole.shape[0])
    right = whole @ v
    for other in (batched, tight):
        assert (other @ v - right).norm() <= ROUNDING * right.norm()


def test_token_losses_weigh_samples_by_their_valid_tokens():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5))
    x, y = torch.randn(4, 3, 3), torch.randint(0, 5, (4, 3))
    y[0, 1:] = y[2, 2] = -100
    valid = (y != -100).sum()

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        inputs, targets = batch
        return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()), (targets != -100).sum()

    class Share(nn.Module):
        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            total = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="sum")
            return total * len(x) / valid  # so that H is the mean of the H_i

    hessians = dense_hessians(model, Share(), x, y)
    hessian = Hessian(model, loss, [(x, y)])
    v = torch.randn(hessian.shape[0])
    right = (moment(hessians, 2) - torch.linalg.matrix_power(hessians.mean(0), 2)) @ v
    assert (hessian.moment_operator(2) @ v - right).norm() <= ROUNDING * right.norm()


class Exponential(torch.autograd.Function):
    """A derivative that is written by hand, which vmap does not know."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].exp()


def of_weight(function):
    class Reparametrised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, function(self.weight))

    return Reparametrised()


def plain(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def penalised(model, batch):
    """A loss that differentiates inside: by its inputs."""
    x = batch[0].clone().requires_grad_()
    value = model(x)
    (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    return F.cross_entropy(value, batch[1]) + slope.square().sum(1).mean()


@pytest.mark.parametrize(
    ("model", "loss", "fallback"),
    [
        (lambda: of_weight(lambda w: torch.zeros(3, 4).add_(w)), plain, "add_: every sample is measured by itself"),
        (lambda: of_weight(Exponential.apply), plain, "plain autograd: every sample is measured by itself"),
        (lambda: prepared("MLP")[0], penalised, "plain autograd: every sample has its own copy of the weights"),
    ],
)
def test_what_has_no_rule_is_named_and_measured_exactly(model, loss, fallback):
    model, x, y = model(), torch.randn(6, 4), torch.randint(0, 3, (6,))
    samples = [(x[i : i + 1], y[i : i + 1]) for i in range(6)]
    hessians = torch.stack([dense_hessian(model, lambda m, one=one: loss(m, one)) for one in samples])
    hessian = Hessian(model, loss, [(x, y)])
    v = torch.randn(hessian.shape[0])
    right = (moment(hessians, 2) - torch.linalg.matrix_power(hessians.mean(0), 2)) @ v
    with pytest.warns(UserWarning, match=fallback):
        assert (hessian.moment_operator(2) @ v - right).norm() <= ROUNDING * right.norm()


def test_parameters_left_out_are_constants():
    model, x, y = prepared("CNN with batch norm and residuals")
    hessians = dense_hessians(model, nn.CrossEntropyLoss(), x, y)
    sizes = [p.numel() for p in model.parameters()]
    names = [name for name, _ in model.named_parameters()]
    index = torch.cat(
        [torch.arange(sum(sizes[:i]), sum(sizes[: i + 1])) for i, n in enumerate(names) if n.startswith("second")]
    )
    part = hessians[:, index][:, :, index]
    hessian = Hessian(model, nn.CrossEntropyLoss(), (x, y), params="second*")
    v = torch.randn(hessian.shape[0])
    right = (moment(part, 2) - torch.linalg.matrix_power(part.mean(0), 2)) @ v
    assert (hessian.moment_operator(2) @ v - right).norm() <= ROUNDING * right.norm()


def test_batch_norm_with_batch_statistics_is_refused():
    model, x, y = prepared("CNN with batch norm and residuals")
    hessian = Hessian(model, nn.CrossEntropyLoss(), (x, y), mode="train")
    with pytest.raises(ValueError, match="got batch norm with the statistics of the batch"):
        hessian.moments()


def test_samples_that_depend_on_each_other_are_not_taken_apart():
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(h - h.mean(0))

    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    with pytest.raises(ValueError, match="samples that do not depend on each other"):
        Hessian(Mixing(), nn.CrossEntropyLoss(), (x, y)).moments(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda h: h.moments(1), "order must be between 2 and 8, got 1"),
        (lambda h: h.moments(unit="epoch"), "unit must be 'sample' or 'batch', got 'epoch'"),
        (lambda h: h.moments(unit="batch"), "unit='batch' needs data in batches"),
        (lambda h: h.moment_operator(0), "order must be >= 1, got 0"),
    ],
)
def test_bad_arguments_get_one_clear_line(call, message):
    model, x, y = prepared("MLP")
    with pytest.raises(ValueError, match=message):
        call(Hessian(model, nn.CrossEntropyLoss(), (x, y)))


def test_the_model_is_left_as_it_was():
    model, x, y = prepared("transformer")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Hessian(model, nn.CrossEntropyLoss(), (x, y)).moments(2)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_samples_that_are_all_alike_have_moments_of_zero():
    model, x, y = prepared("MLP")
    model[0].weight.data.zero_()
    model[0].bias.data.zero_()  # all outputs are the same; the mean over equal Hessians leaves only rounding
    found = Hessian(model.float(), nn.CrossEntropyLoss(), (x, torch.zeros_like(y)), params="2.bias").moments()
    assert found.converged and found.matvecs < 100
    assert all(value == 0 for value in found.nonuniformity.values())


def test_samples_that_are_fitted_to_rounding_are_no_reason_for_a_fallback():
    torch.manual_seed(0)
    x = torch.randn(8, 20)
    y = torch.arange(8) % 4
    model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4)).float()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x.float()), y).backward()
        optimizer.step()
    assert nn.functional.cross_entropy(model(x.float()), y) < 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no fallback
        Hessian(model, nn.CrossEntropyLoss(), (x, y)).moment_operator(2) @ torch.ones(20 * 16 + 16 + 16 * 4 + 4)


@pytest.mark.parametrize("params", [None, "0.*", ["2.weight"]])
def test_parameters_that_are_parts_of_one_vector_are_told_apart(params):
    model, x, y = prepared("MLP")
    right = Hessian(model, nn.CrossEntropyLoss(), (x, y), params=params).moment_operator(3)
    v = torch.randn(right.shape[0])
    expected = right @ v
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()), model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is not measured the slow way
        found = Hessian(model, nn.CrossEntropyLoss(), (x, y), params=params).moment_operator(3) @ v
    assert (found - expected).norm() <= ROUNDING * expected.norm()


def test_an_lstm_whose_weights_are_parts_of_one_buffer_is_measured_as_cudnn_keeps_them():
    model, x, y = prepared("LSTM")
    right = Hessian(model, nn.CrossEntropyLoss(), (x, y)).moment_operator(3)
    v = torch.randn(right.shape[0])
    expected = right @ v
    buffer, start = nn.utils.parameters_to_vector(model.lstm.parameters()).detach(), 0
    for weight in model.lstm.parameters():
        weight.data = buffer[start : start + weight.numel()].view_as(weight)
        start += weight.numel()
    found = Hessian(model, nn.CrossEntropyLoss(), (x, y)).moment_operator(3) @ v
    assert (found - expected).norm() <= ROUNDING * expected.norm()


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_no_step_of_a_chain_waits_for_the_device(curvature):
    model, x, y = prepared("CNN with batch norm and residuals")
    operator = Hessian(model, nn.CrossEntropyLoss(), (x, y), curvature=curvature).moment_operator(4)
    v = torch.randn(operator.shape[0])
    with operator.products() as centred:
        centred.apply(v)  # builds the graphs
        with Waits() as waits:
            centred.apply(v)
    assert waits.count == 0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_moments_on_a_gpu_equal_those_on_the_cpu(name):
    model, x, y = prepared(name)
    hessian = Hessian(model, nn.CrossEntropyLoss(), (x, y))
    v = torch.randn(hessian.shape[0])
    right = hessian.moment_operator(3) @ v
    found = Hessian(model.cuda(), nn.CrossEntropyLoss(), (x, y)).moment_operator(3) @ v
    assert (found.cpu() - right).norm() <= ROUNDING * right.norm()


class Packing(nn.Module):
    """Packs what it gets, and reads the last states and what the outputs sum to."""

    def __init__(self, kind: type[nn.Module], **settings: Any) -> None:
        super().__init__()
        self.inner = kind(3, 2, batch_first=True, **settings)
        self.head = nn.Linear(2 * (2 if self.inner.bidirectional else 1), 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        outputs, last = self.inner(packed)
        last = last[0] if isinstance(last, tuple) else last
        sums = pad_packed_sequence(outputs, batch_first=True)[0].sum(1)
        return self.head(sums + last[: 2 if self.inner.bidirectional else 1].transpose(0, 1).flatten(1))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Packing(nn.LSTM),
        lambda: Packing(nn.LSTM, num_layers=2, bidirectional=True),
        lambda: Packing(nn.GRU, bidirectional=True),
        lambda: Packing(nn.RNN, bias=False),
    ],
)
def test_samples_are_told_apart_in_sequences_that_the_network_packs(make):
    model = make()
    x, lengths, y = torch.randn(4, 5, 3), torch.tensor([3, 1, 5, 3]), torch.arange(4) % 3

    def loss(model, batch):
        return F.cross_entropy(model(batch["x"], batch["n"]), batch["y"])

    batch = {"x": x, "n": lengths, "y": y}
    hessians = torch.stack(
        [
            dense_hessian(model, lambda m, i=i: F.cross_entropy(m(x[i : i + 1], lengths[i : i + 1]), y[i : i + 1]))
            for i in range(4)
        ]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no fallback
        hessian = Hessian(model, loss, [batch])
        v = torch.randn(hessian.shape[0])
        right = (moment(hessians, 2) - torch.linalg.matrix_power(hessians.mean(0), 2)) @ v
        assert (hessian.moment_operator(2) @ v - right).norm() <= ROUNDING * right.norm()


def test_packed_sequences_are_refused_by_name_and_leave_the_other_sharpnesses():
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(3, 3, batch_first=True), nn.Linear(3, 2)

        def forward(self, x: nn.utils.rnn.PackedSequence) -> Tensor:
            return self.head(self.lstm(x)[1][0][-1])

    packed = nn.utils.rnn.pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])
    hessian = Hessian(Packed(), nn.CrossEntropyLoss(), [(packed, torch.tensor([0, 1]))])
    with pytest.raises(ValueError, match="got a PackedSequence"):
        hessian.moments()
    found = hessian.sharpness()
    assert found.worst > 0 and "PackedSequence" in found.notes[0]


@pytest.mark.parametrize("unit", ["sample", "batch"])
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize(
    ("dtype", "exponents"), [(torch.float64, [-548, -133, 332]), (torch.float32, [-60, -33, 33, 60])]
)
@pytest.mark.filterwarnings("ignore:M_. - H:UserWarning")
def test_moments_scale_with_the_loss(dtype, exponents, curvature, unit):
    model, x, y = prepared("MLP")
    model, x = model.to(dtype), x.to(dtype)

    def found(exponent):
        def loss(model, batch):
            return F.cross_entropy(model(batch[0]), batch[1]) * 2.0**exponent

        moments = Hessian(model, loss, [(x[:3], y[:3]), (x[3:], y[3:])], curvature=curvature).moments(4, unit)
        assert moments.converged
        return torch.tensor([moments.sharpness, *moments.nonuniformity.values()]) / 2.0**exponent

    right = found(0)
    for exponent in exponents:
        # the chain's own rescaling by norms rounds differently
        assert torch.allclose(found(exponent), right, rtol=20 * torch.finfo(dtype).eps), exponent


def test_powers_that_a_float64_does_not_hold_are_nan_and_said():
    model, x, y = prepared("MLP")
    hessian = Hessian(model, lambda m, b: F.cross_entropy(m(b[0]), b[1]) * 1e-165, [(x, y)])
    with pytest.warns(UserWarning, match=r"M_2 - H\^2 is about 2\^-\d+, which a float64 does not hold"):
        found = hessian.moments(2)
    assert found.powers[2] != found.powers[2] and found.nonuniformity[2] > 0
    with pytest.raises(ValueError, match="products must be numbers that float64 holds"):
        hessian.moment_operator(2) @ torch.ones(hessian.shape[0])


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_that_are_equal_have_no_nonuniformity_at_any_order(n, dtype):
    for p in (1, 4, 9):
        model = nn.Linear(p, 1, bias=False).to(dtype)
        x = torch.randn(1, p).to(dtype).expand(n, p)
        found = Hessian(model, nn.MSELoss(), (x, torch.ones(n, 1)), curvature="ggn").moments(6)
        assert found.converged and set(found.nonuniformity.values()) == {0.0}
        assert all(abs(found.powers[k]) <= found.errors[k] for k in found.powers)


@pytest.mark.parametrize("what", ["moments", "stability", "sharpness", "blocks", "eigenvalues", "density", "trace"])
def test_a_loss_whose_products_are_nan_gets_one_line_from_every_measurement(what):
    model, x = nn.Linear(4, 1), torch.randn(30, 4)
    anchor = model.weight.detach().clone()

    def loss(model, batch):
        return (model(batch[0]) - batch[1]).square().mean() + (model.weight - anchor).norm()  # not smooth at 0

    hessian = Hessian(model, loss, (x, torch.randn(30, 1)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="the product H v must be finite"):
            getattr(hessian, what)(*([0.1] if what == "stability" else []))
