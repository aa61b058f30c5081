"""Everything on a GPU in a few minutes: the device tests, then products, eigenvalues, moments and SAM steps, timed.

    python bench/cuda.py

Needs a CUDA device. Each figure is beside the same one on the CPU of this machine, and the values of both must agree.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

sys.path.pop(0)  # this folder, in which torch would find this file for its package of the same name

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import nn  # noqa: E402

from samlite import SAM, AgnosticSAM, FriendlySAM, Hessian, SAMPa  # noqa: E402
from samlite.models import mlp, resnet18  # noqa: E402

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "MLP 784-300-100-10": (lambda: mlp(784, 300, 100, 10), (784,), 4096),
    "ResNet-18, 16 filters": (lambda: resnet18(16, mean=[0.5] * 3, std=[0.25] * 3, outputs=10), (3, 32, 32), 256),
}


def seconds(work: Callable[[], Any], repeats: int = 5) -> float:
    """The median of some calls, each until the device is done, after one that warms up."""
    found = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return median(found[1:])


def measured(
    device: str, build: Callable[[], nn.Module], shape: tuple[int, ...], n: int
) -> dict[str, tuple[float, Any]]:
    """Seconds and the value of each measurement."""
    torch.manual_seed(0)
    model = build().to(device)
    data = (torch.randn(n, *shape).to(device), torch.randint(10, (n,)).to(device))
    hessian = Hessian(model, nn.CrossEntropyLoss(), data)
    v = torch.randn(hessian.shape[0], generator=torch.Generator().manual_seed(1)).to(device)
    second = hessian.moment_operator(2)
    found: dict[str, tuple[float, Any]] = {
        "H v": (seconds(lambda: hessian @ v), float((hessian @ v).norm())),
        "(M_2 - H²) v": (seconds(lambda: second @ v), float((second @ v).norm())),
        "5 eigenvalues": (seconds(lambda: hessian.eigenvalues(5), 3), float(hessian.eigenvalues(5).values[0])),
    }
    for kind, closures in ((SAM, 1), (FriendlySAM, 1), (AgnosticSAM, 2), (SAMPa, 2)):
        optimizer = kind(model.parameters(), torch.optim.SGD, rho=0.05, model=model, lr=1e-3)

        def closure() -> torch.Tensor:
            loss = nn.functional.cross_entropy(model(data[0][:128]), data[1][:128])
            loss.backward()
            return loss

        found[f"{kind.__name__} step"] = (seconds(lambda: optimizer.step(*[closure] * closures)), None)  # noqa: B023
    return found


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("bench/cuda.py needs a CUDA device, and torch finds none")
    console = Console()
    console.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    tests = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "cuda"])
    wrong = tests.returncode != 0
    for name, case in CASES.items():
        there, here = measured("cuda", case), measured("cpu", case)
        table = Table("what", "ms on the GPU", "ms on the CPU", "agree", title=name)
        for what, (time_there, value) in there.items():
            time_here, expected = here[what]
            agrees = value is None or abs(value - expected) <= 1e-3 * abs(expected)
            wrong |= not agrees
            verdict = "" if value is None else "yes" if agrees else f"NO: {value:.6g}, {expected:.6g}"
            table.add_row(what, f"{1e3 * time_there:.2f}", f"{1e3 * time_here:.2f}", verdict)
        console.print(table)
    sys.exit(wrong)


if __name__ == "__main__":
    main()
