"""Solvers and optimizers on a device that is not the CPU: a GPU where there is one, and a simulated one anywhere."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import backend_registration

from samlite import SAM, AgnosticSAM, FriendlySAM, Hessian, SAMPa

Check = Callable[[str], list[float]]  # device -> numbers that do not depend on it


class Residual(nn.Module):
    """Convolutions, batch norm, in-place ReLU and an in-place sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.second, self.relu, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.norm(self.first(x)))
        out = self.second(h)
        out += h
        return self.head(self.relu(out).mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x)[:, 0])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.inner = nn.Embedding(3, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(torch.tanh(self.inner(self.words(x))), self.words.weight)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "MLP": (lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)), lambda: torch.randn(12, 3)),
    "CNN": (Residual, lambda: torch.randn(12, 2, 4, 4)),
    "LSTM": (Recurrent, lambda: torch.randn(12, 4, 3)),
    "attention": (Attention, lambda: torch.randn(12, 3, 4)),
    "tied": (Tied, lambda: torch.randint(0, 3, (12,))),
}


def problem(name: str, device: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A model in evaluation mode on the device, in float64; data, too."""
    torch.manual_seed(0)
    build, inputs = MODELS[name]
    model, x = build().double().eval(), inputs()
    x = x.double() if x.is_floating_point() else x
    return model.to(device), x.to(device), torch.randint(0, 3, (12,)).to(device)


def hessian(name: str, device: str, **options: Any) -> Hessian:
    model, x, y = problem(name, device)
    return Hessian(model, nn.CrossEntropyLoss(), (x, y), memory="1GB", **options)


def numbers(*tensors: Tensor) -> list[float]:
    return [value for tensor in tensors for value in tensor.detach().cpu().double().flatten().tolist()]


def product(name: str, order: int, device: str) -> list[float]:
    h = hessian(name, device)
    v = torch.linspace(-1, 1, h.shape[0], dtype=torch.float64).to(device)
    return numbers((h if order == 1 else h.moment_operator(order)) @ v)


def steps(kind: type[SAM], base: Any, options: dict[str, Any], device: str) -> list[float]:
    """The weights after some steps."""
    model, x, y = problem("CNN", device)
    optimizer = kind(model.parameters(), base, rho=0.1, model=model, max_norm=1.0, **options)

    def closure() -> Tensor:
        loss = nn.functional.cross_entropy(nn.functional.dropout(model.train()(x), 0.0), y)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(*[closure] * (2 if kind in (AgnosticSAM, SAMPa) else 1))
    return numbers(*model.parameters())


def normalized(device: str) -> Hessian:
    torch.manual_seed(0)
    model = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3).double()).to(device)
    data = torch.randn(12, 3).double().to(device), torch.randint(0, 3, (12,)).to(device)
    return Hessian(model, nn.CrossEntropyLoss(), data, memory="1GB")


def batches(device: str) -> list[float]:
    model, x, y = problem("MLP", device)
    data = list(zip(x.split(4), y.split(4), strict=True))
    found = Hessian(model, nn.CrossEntropyLoss(), data, memory="1GB").moments(2, "batch", tol=1e-6)
    return list(found.powers.values())


class Spread(nn.Module):
    """Half of it on another device, which passes what it computes on; the output comes back."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 5).to(device), nn.Linear(5, 3)
        self.device = device

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x.to(self.device)))
        return self.second(h.to(self.second.weight.device)).to(x.device)


def spread(device: str) -> list[float]:
    """A network on two devices; vectors are on the first parameter's."""
    torch.manual_seed(0)
    model = Spread("cpu").double()
    model.first.to(device)
    model.device = device
    h = Hessian(model, nn.CrossEntropyLoss(), (torch.randn(12, 3).double(), torch.arange(12) % 3), memory="1GB")
    g = Hessian(model, nn.CrossEntropyLoss(), h._data, memory="1GB", curvature="ggn")
    return numbers(h.eigenvalues(3, tol=1e-9).values, g.eigenvalues(3, tol=1e-9).values, h.gradient())


def measured(measure: Callable[[Hessian], list[float]], **options: Any) -> Check:
    return lambda device: measure(hessian("MLP", device, **options))


WHICH = ("LA", "SA", "LM")
BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01}),
}
CHAINS = [f"(M_3 - H³) v, {name}" for name in MODELS]
CHECKS: dict[str, Check] = {
    **{f"H v, {name}": lambda device, name=name: product(name, 1, device) for name in MODELS},
    **{CHAINS[i]: lambda device, name=name: product(name, 3, device) for i, name in enumerate(MODELS)},
    **{which: measured(lambda h, which=which: numbers(h.eigenvalues(3, which, tol=1e-9).values)) for which in WHICH},
    "two devices": spread,
    "power iteration": measured(lambda h: numbers(h.eigenvalues(1, method="power", tol=1e-4).values)),
    "eigenvectors": measured(lambda h: numbers(h.eigenvalues(2, tol=1e-9, vectors=True).vectors.abs())),
    "H v, weight norm": lambda device: numbers(normalized(device) @ torch.ones(15, dtype=torch.float64, device=device)),
    "Gauss-Newton": measured(lambda h: numbers(h.eigenvalues(3, tol=1e-9).values), curvature="ggn"),
    "moments": measured(lambda h: [m := h.moments(3, tol=1e-6), m.sharpness, *m.powers.values()][1:]),
    "moments of batches": batches,
    "trace": measured(lambda h: [h.trace(tol=0.2).value]),
    "Frobenius": measured(lambda h: [h.frobenius(tol=0.2).value]),
    "spectral moments": measured(lambda h: numbers(h.spectral_moments(2, tol=0.5).value)),
    "density": measured(lambda h: numbers(h.density(tol=0.5, steps=10).density)),
    "stability": measured(lambda h: [h.stability(0.1, 0.05, tol=1e-2).max_lr], curvature="ggn"),
    "sharpness": measured(lambda h: [s := h.sharpness(), s.worst, s.ascent, s.average][1:]),
    "blocks": measured(lambda h: [x for b in h.blocks().values() for x in numbers(b.eigenvalues.values)]),
    **{
        f"{kind.__name__} over {base}": lambda device, kind=kind, base=base: steps(kind, *BASES[base], device)
        for kind in (SAM, FriendlySAM, AgnosticSAM, SAMPa)
        for base in BASES
    },
}


def close(found: Any, expected: list[float]) -> None:
    assert not isinstance(found, str), found
    scale = max(map(abs, expected))
    # the order of summation differs between devices; stability and the density amplify it most
    assert torch.allclose(torch.tensor(found), torch.tensor(expected), rtol=1e-6, atol=1e-9 * scale)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CHECKS)
def test_a_gpu_gives_what_the_cpu_does(name: str) -> None:
    close(CHECKS[name]("cuda"), CHECKS[name]("cpu"))


@contextmanager
def coarse() -> Iterator[None]:
    """Everything that rounds within products is switched on."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    try:
        with torch.autocast("cuda", torch.bfloat16):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["MLP", "CNN", "LSTM", "attention"])
def test_rounding_that_is_switched_on_on_a_gpu_does_not_enter_a_product(name: str) -> None:
    model, x, y = problem(name, "cuda")
    exact = product(name, 1, "cpu")
    with coarse():
        h = Hessian(model.float(), nn.CrossEntropyLoss(), (x.float(), y), memory="1GB")
        found = numbers(h @ torch.linspace(-1, 1, h.shape[0], device="cuda"))
    scale = max(map(abs, exact))
    # float32 rounds to 6e-8, TF32 to 5e-4
    assert torch.allclose(torch.tensor(found), torch.tensor(exact), rtol=0, atol=1e-5 * scale)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", [SAM, FriendlySAM, AgnosticSAM, SAMPa])
def test_an_autocast_region_around_a_step_on_a_gpu_is_one_in_the_closure(kind: type[SAM]) -> None:
    def trained(around: bool, rho: float = 0.5) -> Tensor:
        model, x, y = problem("MLP", "cuda")
        model, x = model.float(), x.float()
        optimizer = kind(model.parameters(), torch.optim.SGD, rho=rho, lr=0.1)

        def half(on: bool) -> Any:
            return torch.autocast("cuda", torch.float16) if on else nullcontext()

        def closure() -> Tensor:
            with half(not around):
                loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        for _ in range(3):
            with half(around):
                optimizer.step(*[closure] * (2 if kind in (AgnosticSAM, SAMPa) else 1))
        return torch.cat([w.detach().flatten() for w in model.parameters()])

    assert torch.equal(trained(True), trained(False))
    assert not torch.equal(trained(True), trained(True, rho=0.0))


SLOW = {"moments", "moments of batches", "stability", "sharpness", "power iteration", *CHAINS} - {CHAINS[0]}


SIMULATED = pytest.mark.skipif(
    not hasattr(backend_registration, "_DummyBackendModule"), reason="this torch cannot simulate a device"
)


@cache
def simulated(*names: str) -> dict[str, Any]:
    """What these checks find on the simulated device."""
    script = Path(__file__).with_name("simulated.py")
    done = subprocess.run([sys.executable, str(script), *names], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@SIMULATED
@pytest.mark.parametrize("name", [name for name in CHECKS if name not in SLOW])
def test_a_device_that_cannot_mix_with_the_cpu_gives_what_the_cpu_does(name: str) -> None:
    close(simulated(*(name for name in CHECKS if name not in SLOW))[name], CHECKS[name]("cpu"))


@SIMULATED
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SLOW))
def test_a_device_that_cannot_mix_with_the_cpu_gives_what_the_cpu_does_slowly(name: str) -> None:
    close(simulated(*sorted(SLOW))[name], CHECKS[name]("cpu"))
