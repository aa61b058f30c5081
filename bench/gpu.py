"""Everything on a GPU in a few minutes: the device tests, then every solver, chain, optimizer and offline task, timed.

    python bench/gpu.py [--device cuda] [--skip-tests] [--peers]

Each figure is beside the same one on the CPU of this machine, and the values of both must agree. "waits" counts the
operations for which the host reads a number of the device. --peers measures five eigenvalues beside PyHessian,
hessian-eigenthings and curvlinops, where they are installed. With `--device cpu` both are the CPU, which shows that the
script itself is sound where there is no GPU.
"""

import argparse
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import common
import torch
from rich.console import Console
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from samlite import SAM, AgnosticSAM, FriendlySAM, Hessian, SAMPa, tasks
from samlite.training.config import Config, usable_device
from samlite.training.loop import train

TESTS = Path(__file__).parents[1] / "tests"
CASES: dict[str, tuple[str, Callable[[], nn.Module], tuple[int, ...], int]] = {
    "mlp": ("MLP 784-300-100-10", common.large_mlp, (784,), 1024),
    "resnet18": ("ResNet-18, 16 filters", common.image_resnet, (3, 32, 32), 128),
}
TASKS = {"digits": 64, "synthetic": 192, "cartpole": 8}  # without data of one's own, and their widths


class Waits(TorchDispatchMode):
    """Counts the operations for which the host waits for a number."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.__name__.split(".")[0] in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")
        return func(*args, **(kwargs or {}))


@dataclass
class Figure:
    """Of one measurement on one device."""

    name: str
    seconds: float
    waits: int
    value: float | None = None


def figure(name: str, work: Callable[[], Any], value: Callable[[Any], Any] | None = None, repeats: int = 3) -> Figure:
    """The median seconds of some calls, after one that warms up and is counted."""
    with Waits() as waits:
        result = work()
    times = [common.seconds(work) for _ in range(repeats)]
    return Figure(name, median(times), waits.count, float(value(result)) if value else None)


def solvers(device: str, build: Callable[[], nn.Module], shape: tuple[int, ...], n: int) -> Iterator[Figure]:
    """Every product and solver on one network."""
    torch.manual_seed(0)
    model = build().to(device).eval()
    inputs, targets = torch.randn(n, *shape).to(device), torch.randint(10, (n,)).to(device)
    for kind in ("hessian", "ggn"):
        h = Hessian(model, nn.CrossEntropyLoss(), (inputs, targets), curvature=kind)
        v = torch.randn(h.shape[0], generator=torch.Generator().manual_seed(1)).to(device)
        second = h.moment_operator(2)
        yield figure(f"{kind}: H v", lambda h=h, v=v: (h @ v).norm(), lambda norm: norm)
        yield figure(f"{kind}: (M_2 - H²) v", lambda second=second, v=v: (second @ v).norm(), lambda norm: norm)
        yield figure(f"{kind}: 3 eigenvalues", lambda h=h: h.eigenvalues(3), lambda r: r.values[0])
        yield figure(f"{kind}: smallest", lambda h=h: h.eigenvalues(which="SA"), lambda r: r.values[0])
        yield figure(f"{kind}: trace", lambda h=h: h.trace(), lambda r: r.value)
        yield figure(f"{kind}: density", lambda h=h: h.density(steps=20), lambda r: r.nodes.max(), repeats=1)
    h = Hessian(model, nn.CrossEntropyLoss(), (inputs[:64], targets[:64]))
    yield figure("power iteration", lambda: h.eigenvalues(method="power", tol=0.05), lambda r: r.values[0], repeats=1)
    yield figure("moments, n 64", lambda: h.moments(order=2, tol=0.01), lambda r: r.nonuniformity[2], repeats=1)


def steps(device: str, build: Callable[[], nn.Module], shape: tuple[int, ...]) -> Iterator[Figure]:
    """A step of every optimizer, on a batch of 128."""
    torch.manual_seed(0)
    model = build().to(device)
    inputs, targets = torch.randn(128, *shape).to(device), torch.randint(10, (128,)).to(device)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        return loss

    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    yield figure("SGD step", lambda: optimizer.step(closure), repeats=9)
    for kind, closures in ((SAM, 1), (FriendlySAM, 1), (AgnosticSAM, 2), (SAMPa, 2)):
        optimizer = kind(model.parameters(), torch.optim.SGD, rho=0.05, model=model, lr=1e-3)
        yield figure(f"{kind.__name__} step", lambda: optimizer.step(*[closure] * closures), repeats=9)  # noqa: B023


def trained(device: str) -> Iterator[Figure]:
    """Two epochs of every task that brings its data, where its packages are installed."""
    for name, width in TASKS.items():

        def run(name: str = name, width: int = width) -> float:
            with tempfile.TemporaryDirectory() as folder:
                config = Config.of(name, width=width, optimizer="sam", epochs=2, device=device)
                return list(train(config, folder))[-1].train_loss

        try:
            tasks.get(name).load(None, 0)
        except ImportError as error:
            print(f"{name} is left out: {error}")
            continue
        yield Figure(f"{name}, 2 epochs", common.seconds(run), 0)


def compare(console: Console, title: str, there: list[Figure], here: list[Figure], device: str) -> bool:
    """Print the figures of both devices; whether all values agree."""
    table = common.table(title, "what", f"ms on {device}", "ms on the CPU", "of SGD", "waits", "agree")
    right, sgd = True, next((each.seconds for each in there if each.name == "SGD step"), None)
    for one, other in zip(there, here, strict=True):
        # Random probes and iterations stop elsewhere on other roundings: their values agree to their tolerance.
        agrees = one.value is None or abs(one.value - other.value) <= 0.05 * abs(other.value)  # type: ignore[operator]
        right &= agrees
        verdict = "" if one.value is None else "yes" if agrees else f"NO: {one.value:.6g}, {other.value:.6g}"
        of_sgd = f"{one.seconds / sgd:.2f}" if sgd else ""
        milliseconds = [f"{1e3 * each.seconds:.2f}" for each in (one, other)]
        table.add_row(one.name, *milliseconds, of_sgd, str(one.waits), verdict)
    console.print(table)
    return right


def peers(console: Console, device: str) -> None:
    """Five eigenvalues on the device, each contender at the cheapest setting that is right."""
    import hessian

    for name in ("mlp-small", "mlp-mnist"):
        case = hessian.CASES[name]
        case.train()
        hessian.find_truth(case, starts=2)
        case.model, case.x, case.y = case.model.to(device), case.x.to(device), case.y.to(device)
        table = common.table(f"{case.title} on {device}", "", "setting", "error", "gradients")
        for contender in hessian.CONTENDERS:
            try:
                runs = [hessian.best_run(contender, case, seed) for seed in (0, 1)]
            except ImportError as error:
                console.print(f"{contender.name} is left out: {error}")
                continue
            error = max(run.error for run in runs)
            table.add_row(
                contender.name, runs[0].setting, f"{error:.0e}", common.spread([r.gradients for r in runs], ".1f")
            )
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--case", default=",".join(CASES), help="networks, separated by commas (%(default)s)")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--peers", action="store_true")
    options = parser.parse_args()
    device, console, right = options.device, common.console(), True
    warnings.filterwarnings("ignore")
    try:
        usable_device(device)
    except ValueError as error:
        sys.exit(str(error))
    if torch.device(device).type == "cuda":
        console.print(torch.cuda.get_device_name(device))
        if not options.skip_tests:
            command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", str(TESTS)]
            right = subprocess.run(command).returncode == 0
    for name in options.case.split(","):
        title, build, shape, n = CASES[name]
        both = [list(solvers(where, build, shape, n)) for where in (device, "cpu")]
        right &= compare(console, title, *both, device)
        both = [list(steps(where, build, shape)) for where in (device, "cpu")]
        right &= compare(console, f"{title}, batch 128", *both, device)
    right &= compare(console, "training with SAM", list(trained(device)), list(trained("cpu")), device)
    if options.peers:
        peers(console, device)
    console.print(common.footer())
    sys.exit(not right)


if __name__ == "__main__":
    main()
