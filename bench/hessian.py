"""The five (or k) largest Hessian eigenvalues: samlite beside PyHessian, hessian-eigenthings and curvlinops + ARPACK.

    pip install ".[bench]"
    python bench/hessian.py [--case mlp-small,mlp-mnist,resnet18,timm-resnet18] [--repeats 3] [--json FILE]

The unit is the time of one full gradient (plain forward and backward on the same data), measured beside every
run. A run starts from nothing, so its time holds all that it builds, and each of its values must be right
to 1e-3. Peers get the whole data set as one batch and the cheapest setting with which they are right; each
repeat starts from another random vector.

The truth comes from no contender: Ritz vectors of a Lanczos run with full reorthogonalisation, then
Rayleigh-Ritz with float64 products, accepted on its float64 residuals; every other start must agree with it.

Krylov limit: the price of a product H v from a retained graph, times the number of products after which the
Ritz values of a random start are right (median over the starts). The floor adds what has to be paid as
well: building that graph, and one product that certifies the result.
"""

import argparse
import copy
import json
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import common
import numpy as np
import torch
from common import CRITERION, timed, warm_seconds
from rich.table import Table
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

from samlite.models import mlp

TOL = 1e-3
PACKAGES = ("samlite", "torch", "scipy", "pyhessian", "hessian-eigenthings", "curvlinops-for-pytorch")

# ---- Cases -----------------------------------------------------------------------------------------------


@dataclass
class Case:
    title: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of the inputs, (n, ...)
    k: int = 5  # eigenvalues
    model: nn.Module = field(init=False)
    x: Tensor = field(init=False)
    y: Tensor = field(init=False)
    truth: np.ndarray = field(init=False)  # (k,), largest first
    sixth: float = field(init=False)
    krylov: list[np.ndarray] = field(init=False)  # the tridiagonal matrix T of each start
    right: dict[str, Any] = field(default_factory=dict)  # the setting with which each contender was right last

    def train(self) -> None:
        """Random inputs, labels by a random linear map, 5 epochs of SGD."""
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

    def gradient(self, create_graph: bool = False) -> tuple[Tensor, ...]:
        loss = CRITERION(self.model(self.x), self.y)
        return torch.autograd.grad(loss, list(self.model.parameters()), create_graph=create_graph)

    def start(self, seed: int) -> Tensor:
        """(p,) float32: the vector with which hessian-eigenthings starts for this seed."""
        size = sum(p.numel() for p in self.model.parameters())
        return torch.randn(size, generator=torch.Generator().manual_seed(seed))

    def error(self, values: Any) -> float:
        """The largest relative error of the values."""
        return float(np.abs(np.sort(np.asarray(values))[::-1] / self.truth - 1).max())


def timm_resnet() -> nn.Module:
    import timm

    return timm.create_model("resnet18", num_classes=10)


CASES = {
    "mlp-small": Case("MLP 64-32-32-10, n 1024", lambda: mlp(64, 32, 32, 10), (1024, 64)),
    "mlp-mnist": Case("MLP 784-300-100-10, n 4096", common.large_mlp, (4096, 784)),
    "resnet18": Case("ResNet-18, 16 filters, n 256, 32x32", lambda: common.plain_resnet(16), (256, 3, 32, 32)),
    "timm-resnet18": Case("timm's resnet18, n 8, 64x64, three eigenvalues", timm_resnet, (8, 3, 64, 64), 3),
}
USUAL = [name for name in CASES if name != "timm-resnet18"]  # which needs timm

# ---- Truth and Krylov limit ------------------------------------------------------------------------------


def matvec(grads: tuple[Tensor, ...], params: list[Tensor], v: Tensor) -> Tensor:
    """H v in float64, computed in the precision of the model."""
    parts = v.to(params[0].dtype).split([p.numel() for p in params])
    parts = [part.view_as(p) for part, p in zip(parts, params, strict=True)]
    product = torch.autograd.grad(grads, params, parts, retain_graph=True)
    return torch.cat([h.flatten() for h in product]).double()


def lanczos(product: Callable[[Tensor], Tensor], start: Tensor, k: int, tol: float) -> tuple[np.ndarray, Tensor]:
    """T (m, m) and the top Ritz vectors (k, p) in float64, once their residuals are below tol * theta_k."""
    basis = torch.empty(min(150, len(start)), len(start), dtype=torch.float64)
    basis[0] = start / start.norm()
    alpha: list[float] = []
    beta: list[float] = []
    for m in range(1, len(basis)):
        q = basis[:m]
        w = product(q[-1])
        alpha.append(float(q[-1] @ w))
        for _ in range(2):  # twice is enough for orthogonality to rounding
            w = w - (q @ w) @ q
        t = np.diag(alpha) + np.diag(beta, 1) + np.diag(beta, -1)
        beta.append(float(w.norm()))
        theta, s = np.linalg.eigh(t)
        if m > k and beta[-1] * np.abs(s[-1, -k:]).max() < tol * theta[-k]:
            return t, torch.from_numpy(s[:, -k:].T.copy()) @ q
        basis[m] = w / beta[-1]
    raise RuntimeError(f"Lanczos did not reach {tol} in {len(basis)} products")


def find_truth(case: Case, starts: int) -> None:
    k = case.k
    params, grads = list(case.model.parameters()), case.gradient(create_graph=True)
    runs = [
        lanczos(lambda v: matvec(grads, params, v), case.start(seed), case.k, 1e-3 if seed else 1e-6)
        for seed in range(starts)
    ]
    case.krylov = [t for t, _ in runs]

    x = torch.linalg.qr(runs[0][1].T)[0].T
    hx = torch.zeros_like(x)
    exact = copy.deepcopy(case.model).double()
    params = list(exact.parameters())
    for inputs, targets in zip(case.x.double().split(64), case.y.split(64), strict=True):
        loss = CRITERION(exact(inputs), targets) * len(inputs) / len(case.x)
        grads = torch.autograd.grad(loss, params, create_graph=True)
        hx += torch.stack([matvec(grads, params, v) for v in x])
    values, s = torch.linalg.eigh(x @ hx.T)
    residual = float((s.T @ hx - values[:, None] * (s.T @ x)).norm(dim=1).max())

    case.truth = values.numpy()[::-1]
    case.sixth = float(np.linalg.eigvalsh(case.krylov[0])[-k - 1])
    doubt = residual**2 / (case.truth[-1] - case.sixth) / case.truth[-1]  # bounds the error: Kato and Temple
    apart = max(case.error(np.linalg.eigvalsh(t)[-k:]) for t in case.krylov)
    if not 0 <= doubt < 1e-6 or apart > TOL:
        raise RuntimeError(f"{case.title}: no truth, error up to {doubt:.0e}, starts {apart:.0e} apart")


def products_needed(case: Case, t: np.ndarray) -> int:
    """The number of Lanczos steps from which on all Ritz values are right."""
    wrong = [m for m in range(case.k, len(t)) if case.error(np.linalg.eigvalsh(t[:m, :m])[-case.k :]) > TOL]
    return max(wrong, default=case.k - 1) + 1


# ---- Contenders: `settings` from the cheapest on; `run` returns values and number of products -------------

Outcome = tuple[Any, int | None]


@dataclass(frozen=True)
class Contender:
    name: str
    label: str  # of a setting
    settings: Callable[[Case, int], Iterable[Any]]
    run: Callable[[Case, Any, int], Outcome]


def samlite_run(case: Case, verify: bool, seed: int) -> Outcome:
    from samlite import Hessian

    hessian = Hessian(case.model, CRITERION, (case.x, case.y))
    result = hessian.eigenvalues(k=case.k, verify=verify, seed=seed)
    return result.values, result.matvecs


def pyhessian_settings(case: Case, seed: int) -> list[float]:
    """Tolerances; those that failed from one start are not tried from the next, as a run takes minutes."""
    return [tol for tol in (1e-4, 5e-5, 3e-5, 2e-5, 1e-5, 5e-6, 2e-6) if tol <= case.right.get("PyHessian", 1)]


def pyhessian_run(case: Case, tol: float, seed: int) -> Outcome:
    from pyhessian import hessian

    torch.manual_seed(seed)
    peer = hessian(case.model, CRITERION, data=(case.x, case.y), cuda=case.x.is_cuda)
    values, _ = peer.eigenvalues(maxIter=1000, tol=tol, top_n=case.k)
    case.model.zero_grad()  # frees the graph that hangs on the .grad it leaves behind
    return values, None


def eigenthings_run(case: Case, steps: int, seed: int) -> Outcome:
    """Lanczos: its power iteration takes 5 to 10 times the products, its finite differences are wrong at ReLUs."""
    from hessian_eigenthings import HessianOperator, lanczos, supervised_loss

    operator = HessianOperator(case.model, [(case.x, case.y)], supervised_loss(CRITERION))
    result = lanczos(operator, k=case.k, max_iter=steps, which="LA", reorthogonalize=True, seed=seed)
    return result.eigenvalues, result.iterations


def eigenthings_settings(case: Case, seed: int) -> Iterable[int]:
    """Same start, same T: the Krylov limit says how many steps it needs."""
    steps = products_needed(case, case.krylov[seed])
    return range(steps, steps + 5)


def curvlinops_run(case: Case, setting: tuple[int, float], seed: int) -> Outcome:
    """Without its checks of the data, which cost a pass or two."""
    from curvlinops import HessianLinearOperator

    params, data = list(case.model.parameters()), [(case.x, case.y)]
    operator = HessianLinearOperator(
        case.model, CRITERION, params, data, check_deterministic=False, num_data=len(case.x)
    )
    return arpack(operator.to_scipy(np.float32), case.start(seed).numpy(), case.k, *setting)


def curvlinops_settings(case: Case, seed: int) -> Iterable[tuple[int, float]]:
    """(ncv, tol): ARPACK sees no more of H than its Krylov space, so T tells which take the fewest products."""
    t = case.krylov[seed]
    grid = [(ncv, tol) for ncv in range(2 * case.k, len(t)) for tol in (1.0, 0.1, 0.01, 0.001)]
    tried = [(*arpack(t, np.eye(len(t))[0], case.k, *setting), setting) for setting in grid]
    right = sorted((products, setting) for values, products, setting in tried if case.error(values) < TOL)
    return [setting for _, setting in right[:5]]


def arpack(operator: Any, start: np.ndarray, k: int, ncv: int, tol: float) -> Outcome:
    products = 0

    def matvec(v: np.ndarray) -> np.ndarray:
        nonlocal products
        products += 1
        return operator @ v

    counted = LinearOperator(operator.shape, matvec=matvec, dtype=start.dtype)
    values = eigsh(counted, k, which="LA", v0=start, ncv=ncv, tol=tol, return_eigenvectors=False)
    return values, products


CONTENDERS = (
    Contender("samlite", "", lambda *_: [False], samlite_run),
    Contender("samlite, verify", "", lambda *_: [True], samlite_run),
    Contender("PyHessian", "tol {}", pyhessian_settings, pyhessian_run),
    Contender("hessian-eigenthings", "{} steps", eigenthings_settings, eigenthings_run),
    Contender("curvlinops + ARPACK", "ncv {0[0]}, tol {0[1]}", curvlinops_settings, curvlinops_run),
)

# ---- Measurement -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    gradients: float  # its time, in full gradients
    error: float
    setting: str
    products: int | None


@dataclass(frozen=True)
class Result:
    title: str
    truth: list[float]
    product: float  # H v from a retained graph, in gradients
    graph: float
    needed: float  # products of the Krylov limit
    runs: dict[str, list[Run]]


def limit_prices(case: Case) -> tuple[float, float]:
    """A product from a retained graph, and building that graph, in gradients."""
    params, grads = list(case.model.parameters()), case.gradient(create_graph=True)
    v = [torch.randn_like(p) for p in params]
    before = warm_seconds(case.gradient)
    product = warm_seconds(lambda: torch.autograd.grad(grads, params, v, retain_graph=True))
    graph = warm_seconds(lambda: case.gradient(create_graph=True))
    unit = mean((before, warm_seconds(case.gradient)))
    return product / unit, graph / unit


def best_run(contender: Contender, case: Case, seed: int) -> Run:
    """The first run whose values are right, else the most accurate."""
    runs = []
    for setting in contender.settings(case, seed):
        before = warm_seconds(case.gradient)
        elapsed, (values, products) = timed(lambda setting=setting: contender.run(case, setting, seed))
        unit = mean((before, warm_seconds(case.gradient)))
        runs.append(Run(elapsed / unit, case.error(values), contender.label.format(setting), products))
        if runs[-1].error < TOL:
            case.right[contender.name] = setting
            break
    return min(runs, key=lambda run: run.error)


def measure(case: Case, contenders: Iterable[Contender], repeats: int) -> Result:
    """Contenders take turns; each turn has its own random start."""
    case.train()
    find_truth(case, starts=repeats)
    prices, runs = [], {contender.name: [] for contender in contenders}
    for seed in range(repeats):
        prices.append(limit_prices(case))
        for contender in contenders:
            runs[contender.name].append(best_run(contender, case, seed))
    product, graph = (median(price) for price in zip(*prices, strict=True))
    needed = median(products_needed(case, t) for t in case.krylov)
    return Result(case.title, case.truth.tolist(), product, graph, needed, runs)


# ---- Report ----------------------------------------------------------------------------------------------


def shown(case: Case, result: Result) -> Table:
    top = " ".join(f"{value:.4g}" for value in case.truth)
    size = sum(p.numel() for p in case.model.parameters())
    table = common.table(
        f"{case.title}, p {size:,}: {top}, the sixth {case.sixth:.4g}\n"
        f"H v from a retained graph {result.product:.2f} gradients, building the graph {result.graph:.2f}",
        *("", "setting", "products", "error", "gradients", "min .. max", "/ floor", "/ samlite"),
    )
    limit = result.product * result.needed
    floor = limit + result.graph + result.product
    ours = median(run.gradients for run in result.runs.get("samlite", [])) if "samlite" in result.runs else None

    def row(name: str, products: str, gradients: list[float], setting: str = "", error: str = "") -> None:
        middle = median(gradients)
        spread = f"{min(gradients):.1f} .. {max(gradients):.1f}" if error else ""
        ratio = f"{middle / ours:.2f}" if ours else "-"
        table.add_row(name, setting, products, error, f"{middle:.1f}", spread, f"{middle / floor:.2f}", ratio)

    row("Krylov limit", f"{result.needed:g}", [limit])
    row("floor", f"{result.needed + 1:g}", [floor])
    for name, runs in result.runs.items():
        counts = [run.products for run in runs if run.products is not None]
        error = max(run.error for run in runs)
        row(
            name,
            f"{median(counts):g}" if counts else "",
            [run.gradients for run in runs],
            runs[0].setting,
            f"{error:.0e}" if error < TOL else f"WRONG {error:.0e}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default=",".join(USUAL), help="which, separated by commas (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each contender (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run to FILE as well")
    args = parser.parse_args()
    names = args.case.split(",")
    if not set(names) <= set(CASES):
        parser.error(f"--case must be some of {','.join(CASES)}, got {args.case}")
    if args.repeats < 1:
        parser.error(f"--repeats must be >= 1, got {args.repeats}")

    warnings.filterwarnings("ignore")  # the peers' deprecations
    console = common.console()
    report = {**common.environment(PACKAGES), "cases": []}
    console.print(common.footer(PACKAGES))

    warm_up = CASES["mlp-small"]  # imports and first calls are nobody's merit or fault
    warm_up.train()
    find_truth(warm_up, starts=1)
    contenders = []
    for contender in CONTENDERS:
        try:
            best_run(contender, warm_up, seed=0)
            contenders.append(contender)
        except ImportError as error:
            console.print(f"{contender.name} is left out: {error}")

    for name in names:
        result = measure(CASES[name], contenders, args.repeats)
        console.print(shown(CASES[name], result))
        report["cases"].append(asdict(result))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
