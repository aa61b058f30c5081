"""Everything on a GPU in a few minutes: the device tests, then products, eigenvalues, moments and SAM steps, timed.

    python bench/gpu.py [--device cuda]

Each figure is beside the same one on the CPU of this machine, and the values of both must agree. With `--device cpu`
both are the CPU, which shows that the script itself is sound where there is no GPU.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import common
import torch
from torch import nn

from samlite import SAM, AgnosticSAM, FriendlySAM, Hessian, SAMPa
from samlite.training.config import usable_device

TESTS = Path(__file__).parents[1] / "tests"
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "MLP 784-300-100-10": (common.large_mlp, (784,), 1024),
    "ResNet-18, 16 filters": (common.image_resnet, (3, 32, 32), 128),
}


def timed(work: Callable[[], Any], repeats: int = 3) -> tuple[float, Any]:
    """The median seconds of some calls, after one that warms up; and what that one returned."""
    result = work()
    return median(common.seconds(work) for _ in range(repeats)), result


def measure(
    device: str, build: Callable[[], nn.Module], shape: tuple[int, ...], n: int
) -> dict[str, tuple[float, float | None]]:
    """Seconds of each measurement, and a number to compare."""
    torch.manual_seed(0)
    model = build().to(device)
    inputs, targets = torch.randn(n, *shape).to(device), torch.randint(10, (n,)).to(device)
    hessian = Hessian(model, nn.CrossEntropyLoss(), (inputs, targets))
    v = torch.randn(hessian.shape[0], generator=torch.Generator().manual_seed(1)).to(device)
    second = hessian.moment_operator(2)
    results: dict[str, tuple[float, float | None]] = {}
    for name, work in (
        ("H v", lambda: (hessian @ v).norm()),
        ("(M_2 - H²) v", lambda: (second @ v).norm()),
        ("3 eigenvalues", lambda: hessian.eigenvalues(3).values[0]),
    ):
        time_of_one, value = timed(work)
        results[name] = time_of_one, float(value)

    def closure() -> torch.Tensor:
        loss = nn.functional.cross_entropy(model(inputs[:128]), targets[:128])
        loss.backward()
        return loss

    for kind, closures in ((SAM, 1), (FriendlySAM, 1), (AgnosticSAM, 2), (SAMPa, 2)):
        optimizer = kind(model.parameters(), torch.optim.SGD, rho=0.05, model=model, lr=1e-3)
        results[f"{kind.__name__} step"] = timed(lambda: optimizer.step(*[closure] * closures))[0], None  # noqa: B023
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    wrong = False
    console = common.console()
    try:
        usable_device(device)
    except ValueError as error:
        sys.exit(str(error))
    if torch.device(device).type == "cuda":
        console.print(torch.cuda.get_device_name(device))
        wrong = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "cuda", str(TESTS)]).returncode != 0
    for name, case in CASES.items():
        there, here = measure(device, *case), measure("cpu", *case)
        table = common.table(name, "what", f"ms on {device}", "ms on the CPU", "agree")
        for what, (time_there, value) in there.items():
            time_here, expected = here[what]
            agrees = value is None or abs(value - expected) <= 1e-3 * abs(expected)
            wrong |= not agrees
            verdict = "" if value is None else "yes" if agrees else f"NO: {value:.6g}, {expected:.6g}"
            table.add_row(what, f"{1e3 * time_there:.2f}", f"{1e3 * time_here:.2f}", verdict)
        console.print(table)
    console.print(common.footer())
    sys.exit(wrong)


if __name__ == "__main__":
    main()
