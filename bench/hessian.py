"""The five largest Hessian eigenvalues: samlite beside PyHessian, hessian-eigenthings and curvlinops + ARPACK.

    pip install ".[bench]"
    python bench/hessian.py [--case mlp-small,mlp-mnist,resnet18] [--repeats 3] [--json FILE]

The unit is the time of one full gradient (plain forward and backward on the same data), measured beside every
run. A run starts from nothing, so that its time holds all that it builds; each of its five values must be right
to 1e-3. Peers get the whole data set as one batch, and the cheapest setting with which they are right.

The truth comes from no contender: Ritz vectors of a Lanczos run with full reorthogonalisation, then
Rayleigh-Ritz with float64 products, accepted on its float64 residuals; every other start must agree with it.

Krylov limit: the price of a product H v from a retained graph, times the number of products after which the
five Ritz values of a random start are right (median over the starts). The floor adds what has to be paid as
well: building that graph, and one product that certifies the result.
"""

import argparse
import copy
import json
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor, nn

K, TOL = 5, 1e-3
CRITERION = nn.CrossEntropyLoss()
PACKAGES = ("samlite", "torch", "scipy", "pyhessian", "hessian-eigenthings", "curvlinops-for-pytorch")

# ---- Cases: random inputs, labels by a random linear map, 5 epochs of SGD ----


def mlp(*sizes: int) -> nn.Module:
    layers = [m for a, b in zip(sizes, sizes[1:], strict=False) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def conv(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(inputs, outputs, 3, stride), nn.ReLU(), conv(outputs, outputs, 3, 1))
        self.skip = nn.Identity() if inputs == outputs else conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


def resnet18(width: int) -> nn.Module:
    stages = [Residual(width, width, 1), Residual(width, width, 1)]
    for w in (width, 2 * width, 4 * width):
        stages += [Residual(w, 2 * w, 2), Residual(2 * w, 2 * w, 1)]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, 10)
    return nn.Sequential(conv(3, width, 3, 1), nn.ReLU(), *stages, *head)


@dataclass
class Case:
    title: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of all inputs: (n, ...)
    model: nn.Module = field(init=False)
    x: Tensor = field(init=False)
    y: Tensor = field(init=False)
    truth: np.ndarray = field(init=False)  # (K,), largest first
    sixth: float = field(init=False)
    residual: float = field(init=False)  # the truth's largest, relative to its value
    krylov: list[np.ndarray] = field(init=False)  # the tridiagonal matrix of each start

    def train(self) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(self.shape)
        self.y = (self.x.flatten(1) @ torch.randn(self.x[0].numel(), 10)).argmax(1)
        self.model = self.build()
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        for _ in range(5):
            for batch in torch.randperm(len(self.x)).split(64):
                optimizer.zero_grad()
                CRITERION(self.model(self.x[batch]), self.y[batch]).backward()
                optimizer.step()
        self.model.zero_grad()
        self.model.eval()

    def start(self, seed: int) -> Tensor:
        """(p,) float32: the vector with which hessian-eigenthings starts for this seed."""
        size = sum(p.numel() for p in self.model.parameters())
        return torch.randn(size, generator=torch.Generator().manual_seed(seed))

    def error(self, values: Any) -> float:
        """Largest relative error of the five values."""
        return float(np.abs(np.sort(np.asarray(values))[::-1] / self.truth - 1).max())


CASES = {
    "mlp-small": Case("MLP 64-32-32-10, n 1024", lambda: mlp(64, 32, 32, 10), (1024, 64)),
    "mlp-mnist": Case("MLP 784-300-100-10, n 4096", lambda: mlp(784, 300, 100, 10), (4096, 784)),
    "resnet18": Case("ResNet-18, 16 filters, n 256, 32x32", lambda: resnet18(16), (256, 3, 32, 32)),
}

# ---- Truth and Krylov limit ----


class Graph:
    """The gradient of one batch, its graph kept for products H v."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        self.params = list(model.parameters())
        self.grads = torch.autograd.grad(CRITERION(model(x), y), self.params, create_graph=True)

    def product(self, parts: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.grads, self.params, parts, retain_graph=True)

    def __matmul__(self, v: Tensor) -> Tensor:
        parts = v.split([p.numel() for p in self.params])
        product = self.product([part.view_as(p) for part, p in zip(parts, self.params, strict=True)])
        return torch.cat([h.flatten() for h in product])


def lanczos(matvec: Callable[[Tensor], Tensor], start: Tensor, tol: float) -> tuple[np.ndarray, Tensor]:
    """T (m, m) and the K top Ritz vectors (K, p) in float64, once their residuals are below tol * theta_K."""
    basis = torch.empty(min(150, len(start)), len(start), dtype=torch.float64)
    basis[0] = start / start.norm()
    alpha: list[float] = []
    beta: list[float] = []
    for m in range(1, len(basis)):
        q = basis[:m]
        w = matvec(q[-1])
        alpha.append(float(q[-1] @ w))
        for _ in range(2):  # twice is enough for orthogonality to rounding
            w = w - (q @ w) @ q
        t = np.diag(alpha) + np.diag(beta, 1) + np.diag(beta, -1)
        beta.append(float(w.norm()))
        theta, s = np.linalg.eigh(t)
        if m > K and beta[-1] * np.abs(s[-1, -K:]).max() < tol * theta[-K]:
            return t, torch.from_numpy(s[:, -K:].T.copy()) @ q
        basis[m] = w / beta[-1]
    raise RuntimeError(f"Lanczos did not reach {tol} in {len(basis)} products")


def find_truth(case: Case, starts: int) -> None:
    graph = Graph(case.model, case.x, case.y)

    def matvec(v: Tensor) -> Tensor:
        return (graph @ v.float()).double()

    t, ritz = lanczos(matvec, case.start(0), tol=1e-6)
    case.krylov = [t] + [lanczos(matvec, case.start(seed), tol=TOL)[0] for seed in range(1, starts)]

    x = torch.linalg.qr(ritz.T)[0].T
    hx = torch.zeros_like(x)
    exact = copy.deepcopy(case.model).double()
    for inputs, targets in zip(case.x.double().split(64), case.y.split(64), strict=True):
        graph = Graph(exact, inputs, targets)
        hx += len(inputs) / len(case.x) * torch.stack([graph @ v for v in x])
    values, s = torch.linalg.eigh(x @ hx.T)
    residuals = (s.T @ hx - values[:, None] * (s.T @ x)).norm(dim=1)

    case.truth = values.numpy()[::-1]
    case.sixth = float(np.linalg.eigvalsh(t)[-K - 1])
    case.residual = float((residuals / values).max())
    # The error of a value is at most residual^2 / gap.
    doubt = max(case.residual**2 * case.truth[0] / (case.truth[-1] - case.sixth), 0)
    if doubt > 1e-6 or any(case.error(np.linalg.eigvalsh(t)[-K:]) > TOL for t in case.krylov):
        raise RuntimeError(f"no trustworthy truth for {case.title}: error {doubt:.1e}, or the starts disagree")


def products_needed(case: Case, t: np.ndarray) -> int:
    """The number of Lanczos steps from which on all five Ritz values are right."""
    wrong = [m for m in range(K, len(t)) if case.error(np.linalg.eigvalsh(t[:m, :m])[-K:]) > TOL]
    return max(wrong, default=K - 1) + 1


# ---- Contenders: `settings` yields from the cheapest on; `run` returns the values and the products taken ----


@dataclass(frozen=True)
class Contender:
    name: str
    settings: Callable[[Case, int], Iterable[Any]]
    run: Callable[[Case, Any, int], tuple[Any, int | None]]


def samlite_run(case: Case, verify: bool, seed: int) -> tuple[Any, int | None]:
    from samlite import Hessian

    hessian = Hessian(case.model, CRITERION, (case.x, case.y))
    result = hessian.eigenvalues(k=K, verify=verify, seed=seed)
    return result.values, result.matvecs


def pyhessian_run(case: Case, tol: float, seed: int) -> tuple[Any, int | None]:
    from pyhessian import hessian

    torch.manual_seed(seed)
    peer = hessian(case.model, CRITERION, data=(case.x, case.y), cuda=False)
    values, _ = peer.eigenvalues(maxIter=1000, tol=tol, top_n=K)
    case.model.zero_grad()  # its graph hangs on the .grad that it leaves behind
    return values, None


def eigenthings_run(case: Case, setting: tuple[str, int], seed: int) -> tuple[Any, int | None]:
    from hessian_eigenthings import HessianOperator, lanczos, supervised_loss

    method, steps = setting
    operator = HessianOperator(case.model, [(case.x, case.y)], supervised_loss(CRITERION), method=method)
    result = lanczos(operator, k=K, max_iter=steps, which="LA", reorthogonalize=True, seed=seed)
    return result.eigenvalues, result.iterations


def curvlinops_run(case: Case, setting: tuple[int, float], seed: int) -> tuple[Any, int | None]:
    from curvlinops import HessianLinearOperator

    params, data = list(case.model.parameters()), [(case.x, case.y)]
    operator = HessianLinearOperator(
        case.model, CRITERION, params, data, check_deterministic=False, num_data=len(case.x)
    ).to_scipy(np.float32)
    return arpack(operator, case.start(seed).numpy(), *setting)


def arpack(operator: Any, start: np.ndarray, ncv: int, tol: float) -> tuple[np.ndarray, int]:
    products = 0

    def matvec(v: np.ndarray) -> np.ndarray:
        nonlocal products
        products += 1
        return operator @ v

    counted = LinearOperator(operator.shape, matvec=matvec, dtype=start.dtype)
    return eigsh(counted, K, which="LA", v0=start, ncv=ncv, tol=tol)[0], products


def curvlinops_settings(case: Case, seed: int) -> list[tuple[int, float]]:
    """(ncv, tol), the fewest products first: ARPACK sees of H only its Krylov space, so try them on T."""
    t = case.krylov[seed]
    found = []
    for ncv in range(2 * K, len(t)):
        for tol in (1.0, 0.1, 0.01, 0.001):
            try:
                values, products = arpack(t, np.eye(len(t))[0], ncv, tol)
            except ArpackNoConvergence:
                continue
            if case.error(values) < TOL:
                found.append((products, (ncv, tol)))
    return [setting for _, setting in sorted(found)]


def eigenthings_settings(case: Case, seed: int) -> list[tuple[str, int]]:
    """Lanczos steps; the same start and the same T as in the Krylov limit say how many."""
    steps = products_needed(case, case.krylov[seed])
    return [("autograd", m) for m in range(steps, steps + 10)]


CONTENDERS = (
    Contender("samlite", lambda *_: [False], samlite_run),
    Contender("samlite, verify", lambda *_: [True], samlite_run),
    Contender("PyHessian", lambda *_: [1e-4, 5e-5, 2e-5, 1e-5, 5e-6, 2e-6, 1e-6], pyhessian_run),
    Contender("hessian-eigenthings", eigenthings_settings, eigenthings_run),
    Contender("curvlinops + ARPACK", curvlinops_settings, curvlinops_run),
)

# ---- Measurement ----


@dataclass(frozen=True)
class Run:
    gradients: float  # time over that of one full gradient
    error: float
    setting: Any
    products: int | None


def seconds(f: Callable[[], Any]) -> float:
    """Median time of f, warm."""
    times: list[float] = []
    f()
    while len(times) < 3 or sum(times) < 0.1:
        begin = time.perf_counter()
        f()
        times.append(time.perf_counter() - begin)
    return median(times)


def gradient_seconds(case: Case) -> float:
    params = list(case.model.parameters())
    return seconds(lambda: torch.autograd.grad(CRITERION(case.model(case.x), case.y), params))


def in_gradients(case: Case, f: Callable[[], Any]) -> float:
    before, elapsed, after = gradient_seconds(case), seconds(f), gradient_seconds(case)
    return elapsed / mean((before, after))


def best_run(contender: Contender, case: Case, seed: int) -> Run:
    """The first run whose five values are right, else the most accurate."""
    runs = []
    for setting in contender.settings(case, seed):
        before = gradient_seconds(case)
        begin = time.perf_counter()
        values, products = contender.run(case, setting, seed)
        elapsed = time.perf_counter() - begin
        unit = mean((before, gradient_seconds(case)))
        runs.append(Run(elapsed / unit, case.error(values), setting, products))
        if runs[-1].error < TOL:
            break
    return min(runs, key=lambda r: r.error)


@dataclass
class Result:
    product: float
    graph: float
    needed: list[int]  # products of each start
    runs: dict[str, list[Run]]

    @property
    def limit(self) -> float:
        return self.product * median(self.needed)

    @property
    def floor(self) -> float:
        return self.limit + self.graph + self.product


def measure(case: Case, contenders: Iterable[Contender], repeats: int) -> Result:
    case.train()
    find_truth(case, starts=repeats)
    product, graph = [], []
    runs: dict[str, list[Run]] = {c.name: [] for c in contenders}
    for seed in range(repeats):
        kept = Graph(case.model, case.x, case.y)
        parts = [torch.randn_like(p) for p in kept.params]
        product.append(in_gradients(case, lambda: kept.product(parts)))  # noqa: B023
        graph.append(in_gradients(case, lambda: Graph(case.model, case.x, case.y)))
        for contender in contenders:
            runs[contender.name].append(best_run(contender, case, seed))
    needed = [products_needed(case, t) for t in case.krylov]
    return Result(median(product), median(graph), needed, runs)
