"""Losses that couple samples, hold modules, or go wrong; data that do."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import network, samples
from oracles import dense_hessian
from test_untouched import close, top
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from samlite import Hessian

CE = nn.CrossEntropyLoss()
F = nn.functional


# --- Samples that depend on each other


def info_nce(model: nn.Module, batch: Any) -> Tensor:
    a, b = (F.normalize(model(part), dim=1) for part in batch)
    return F.cross_entropy(a @ b.T / 0.5, torch.arange(len(a)))


def pairwise(model: nn.Module, batch: Any) -> Tensor:
    score, y = model(batch[0])[:, 0], batch[1].double().mean(1)
    return F.softplus((score[:, None] - score[None, :]) * (y[None, :] - y[:, None]).sign()).mean()


def cox(model: nn.Module, batch: Any) -> Tensor:
    score = model(batch[0])[:, 0]
    order = batch[1][:, 0].argsort(descending=True)
    return (torch.logcumsumexp(score[order], 0) - score[order]).mean()


def hardest(model: nn.Module, batch: Any) -> Tensor:
    each = F.cross_entropy(model(batch[0]), batch[1].abs().argmax(1) % 3, reduction="none")
    return each.topk(max(1, len(each) // 4)).values.mean()


def decorrelated(model: nn.Module, batch: Any) -> Tensor:
    z = model(batch[0])
    return z.T.cov().square().sum()


LOSSES = {f.__name__: f for f in (info_nce, pairwise, cox, hardest, decorrelated)}


def pair(n: int = 150) -> tuple[Tensor, Tensor]:
    x, _ = samples(n)
    return x, x + 0.1 * samples(n + 1)[0][1:]


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_couples_samples_is_that_of_the_whole_pair_whatever_the_memory(name: str) -> None:
    model, data, loss = network(), pair(), LOSSES[name]
    truth = dense_hessian(model, lambda f: loss(f, data))
    v = torch.linspace(-1, 1, len(truth), dtype=torch.float64)
    for memory in ("1GB", "100KB", 0):
        product = Hessian(model, loss, data, memory=memory) @ v
        assert torch.allclose(product, truth @ v, rtol=1e-9, atol=1e-12 * float(truth.norm()))


@pytest.mark.filterwarnings("ignore:cov.*degrees of freedom:UserWarning")  # of one sample, whose covariance is nan
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("as_pair", [True, False])
def test_there_are_no_moments_of_samples_that_depend_on_each_other(name: str, as_pair: bool) -> None:
    data = pair(20)
    h = Hessian(network(), LOSSES[name], data if as_pair else [data])
    for measure in (lambda: h.moments(2), lambda: h.stability(0.1)):
        with pytest.raises(ValueError, match="samples that do not depend on each other"):
            measure()
    assert "no ascent of single samples" in " ".join(h.sharpness(tol=0.5).notes)
    if not as_pair:
        assert h.moments(2, "batch").converged


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d(5, track_running_stats=False), nn.BatchNorm1d(5)], ids=["eval", "train"]
)
def test_batch_norm_with_the_statistics_of_the_batch_sees_the_whole_pair(norm: nn.Module) -> None:
    mode: Any = "train" if norm.track_running_stats else "eval"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), norm, nn.Linear(5, 3)).double()
    x, y = samples(1200)
    x[1024:] = 5 * x[1024:] + 3
    whole = top(model, data=[(x, y)], mode=mode)
    for memory in ("1GB", "100KB"):
        assert close(top(model, data=(x, y), memory=memory, mode=mode), whole)


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mean_over_samples_is_not_taken_for_coupled(fitted: bool, dtype: torch.dtype) -> None:
    model, (x, y) = network().to(dtype), samples(100)
    x = x.to(dtype)
    if fitted:  # losses that are nothing but rounding
        with torch.no_grad():
            model[2].weight.mul_(0)
            model[2].bias.copy_(torch.tensor([40.0, 0, 0]))
        y = torch.zeros_like(y)
    h = Hessian(model, CE, (x, y))
    assert not h._losses.coupled
    assert h.moments(2).fallback is None
    regression = Hessian(model, nn.MSELoss(), (x, model(x).detach()))
    assert not regression._losses.coupled and regression.moments(2).converged


# --- Loss modules that hold something


class Penalised(nn.Module):
    def __init__(self, model: nn.Module, weight: Tensor | None = None) -> None:
        super().__init__()
        self.model, self.scale = model, nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.register_buffer("weight", weight)

    def forward(self, out: Tensor, y: Tensor) -> Tensor:
        penalty = sum(p.square().sum() for p in self.model.parameters())
        return F.cross_entropy(out * self.scale, y, self.weight) + 0.5 * penalty


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 2.0, 3.0])], ids=["as it is", "cast beside the model"])
def test_a_loss_module_that_holds_the_model_is_measured_with_it(weight: Tensor | None) -> None:
    model, (x, y) = network(), samples()
    criterion = Penalised(model, weight)

    def function(model: nn.Module, batch: Any) -> Tensor:
        cast = None if weight is None else weight.double()
        penalty = sum(p.square().sum() for p in model.parameters())
        return F.cross_entropy(model(batch[0]) * 0.7, batch[1], cast) + 0.5 * penalty

    assert close(top(model, criterion), top(model, function))
    v = torch.linspace(-1, 1, 43, dtype=torch.float64)
    found, same = (Hessian(model, loss, [(x, y)]) for loss in (criterion, function))
    if weight is None:  # a mean weighted by class is no mean over samples unless it says what it divides by
        with pytest.warns(UserWarning, match="no per-sample rule"):
            moments = found.moment_operator(2) @ v, same.moment_operator(2) @ v
        assert torch.allclose(*moments, rtol=1e-9)
    with torch.no_grad():
        model[0].weight.mul_(2)  # the loss follows the model
    assert torch.allclose(found @ v, same @ v, rtol=1e-9)
    assert weight is None or criterion.weight is weight


def test_parameters_of_the_loss_module_can_be_measured_by_name_or_as_tensors() -> None:
    class Tempered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_t = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

        def forward(self, out: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(out / self.log_t.exp(), y)

    model, criterion, (x, y) = network(), Tempered(), samples()

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.criterion = model, criterion

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x) / self.criterion.log_t.exp()

    truth = torch.linalg.eigvalsh(dense_hessian(Both(), lambda f: CE(f(x), y))).flip(0)[:2]
    tensors = [*model.parameters(), *criterion.parameters()]
    for params in (tensors, ["*"]):
        assert close(top(model, criterion, params=params), truth)
    assert Hessian(model, criterion, (x, y), params="criterion.*").names == ["criterion.log_t"]
    assert Hessian(model, criterion, (x, y)).shape == (43, 43)  # by default those of the model


# --- Wrappers


@pytest.fixture
def alone() -> Iterator[None]:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("unused", [False, True])
def test_a_model_under_ddp_is_measured_and_trains_on(unused: bool) -> None:
    inner, (x, y) = network(), samples()
    model = DistributedDataParallel(inner, find_unused_parameters=unused)

    def closure(_: nn.Module, batch: Any) -> Tensor:
        return CE(model(batch[0]), batch[1])  # the wrapper itself

    for _ in range(2):
        for loss in (CE, closure):
            assert close(top(model, loss), top(network()))
        CE(model(x), y).backward()


@pytest.mark.usefixtures("alone")
def test_processes_cannot_share_a_pair_whose_samples_depend_on_each_other() -> None:
    h = Hessian(network(), info_nce, pair(20), process_group=dist.group.WORLD)
    with pytest.raises(ValueError, match="needs data in batches to be shared by processes"):
        h.eigenvalues(1)


@pytest.mark.usefixtures("alone")
def test_a_model_in_shards_is_refused_in_one_line() -> None:
    from torch.distributed.fsdp import fully_shard

    model = network()
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
    with pytest.raises(
        ValueError, match=r"got 0\.weight in shards \(FSDP or tensor parallel\); load the full state_dict"
    ):
        Hessian(model, CE, samples())


# --- What goes wrong later


def broken(model: nn.Module, batch: Any) -> Tensor:
    if batch[0].shape[0] == 3:
        raise KeyError("three")
    return CE(model(batch[0]), batch[1])


class Loader:
    """Gives good batches, and a bad one as number 2."""

    def __init__(self, bad: Any) -> None:
        self.bad = bad

    def __iter__(self) -> Iterator[Any]:
        x, y = samples()
        yield x[:5], y[:5]
        yield x[5:9], y[5:9]
        if isinstance(self.bad, Exception):
            raise self.bad
        yield self.bad
        yield x[9:], y[9:]


X, Y = samples(3)


@pytest.mark.parametrize(
    ("loss", "bad", "message"),
    [
        (CE, (X, Y + 7), "the loss must be computable on batch 2, got IndexError: Target"),
        (CE, None, r"a loss module needs batches \(inputs, targets\), got NoneType None"),
        (CE, (X, Y[:2]), "computable on batch 2, got ValueError: Expected input batch_size"),
        (CE, KeyError("row"), "data must give all batches, got KeyError: 'row' at batch 2"),
        (broken, (X, Y), "computable on batch 2, got KeyError: 'three'"),
        (CE, (X[:, :2], Y), "computable on batch 2, got RuntimeError: mat1 and mat2"),
        (
            lambda m, b: CE(m(b[0]), b[1]) if len(b[0]) != 3 else None,
            (X, Y),
            "scalar tensor, got NoneType None on batch 2",
        ),
        (
            lambda m, b: (CE(m(b[0]), b[1]), -1 if len(b[0]) == 3 else 1),
            (X, Y),
            "must be a finite number >= 0, got int -1",
        ),
    ],
)
@pytest.mark.parametrize("memory", ["1GB", 0])
def test_what_goes_wrong_in_a_later_batch_is_told_with_its_number(
    loss: Any, bad: Any, message: str, memory: Any
) -> None:
    h = Hessian(network(), loss, Loader(bad), memory=memory)
    for measure in (lambda: h.eigenvalues(1), lambda: h.gradient(), lambda: h @ torch.ones(43).double()):
        with pytest.raises(ValueError, match=message) as error:
            measure()
        assert "\n" not in str(error.value)


def test_an_exhausted_memory_keeps_its_kind() -> None:
    def exhausted(model: nn.Module, batch: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        Hessian(network(), exhausted, samples())


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_losses_of_any_size_are_checked_alike(factor: float) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return factor * CE(model(batch[0]), batch[1])

    assert torch.allclose(top(network(), loss) / factor, top(network()), rtol=1e-8)
    with pytest.raises(ValueError, match="same function at every call"):
        Hessian(network(), lambda m, b: loss(m, b) * (1 + torch.rand(())), samples())
    coupled = Hessian(network(), lambda m, b: factor * info_nce(m, b), pair())
    assert coupled._losses.coupled
