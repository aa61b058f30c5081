"""The price of one step of SAM and its variants, in SGD steps: samlite beside a plain textbook SAM.

    python bench/sam_step.py [--case mlp,resnet18] [--repeats N]

All variants train their own copy of one network on one random batch of 128, with SGD (momentum 0.9) below. In
each repeat every variant runs the same few steps, in an order that rotates, and its time is divided by that of
SGD in the same repeat. "two gradients" is SGD that takes its gradient twice: what no SAM can go below. Textbook
SAM loops over the parameters, and leaves out what samlite does besides: exact restoring, the test of both
gradients, replayed random state, kept buffers. AgnosticSAM takes four gradients, the others two.
"""

import argparse
import copy
import platform
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from samlite import SAM, AgnosticSAM, FriendlySAM, SAMPa, __version__
from samlite.models import mlp, resnet18

BATCH, RHO = 128, 0.05
SGD = {"lr": 0.01, "momentum": 0.9}
Step = Callable[[], object]


# name: (network, shape of one input, steps a repeat, repeats)
CASES = {
    "mlp": ("MLP 784-300-100-10", lambda: mlp(784, 300, 100, 10), (784,), 20, 60),
    "resnet18": (
        "ResNet-18, 16 filters",
        lambda: resnet18(16, mean=[0.5] * 3, std=[0.25] * 3, outputs=10),
        (3, 32, 32),
        1,
        25,
    ),
}


class TextbookSAM(torch.optim.Optimizer):
    """SAM as its papers' code snippets have it."""

    def __init__(self, params, base: torch.optim.Optimizer) -> None:
        super().__init__(params, {})
        self.base = base

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        weights = self.param_groups[0]["params"]
        loss = closure()
        with torch.no_grad():
            norm = torch.norm(torch.stack([w.grad.norm() for w in weights]))
            epsilons = []
            for w in weights:
                epsilon = w.grad * (RHO / (norm + 1e-12))
                w.add_(epsilon)
                epsilons.append(epsilon)
        self.zero_grad()
        closure()
        with torch.no_grad():
            for w, epsilon in zip(weights, epsilons, strict=True):
                w.sub_(epsilon)
        self.base.step()
        self.zero_grad()
        return loss


def variants(network: nn.Module, inputs: Tensor, targets: Tensor) -> dict[str, Step]:
    """One step of each contender, on a copy of the network of its own."""

    def closure(model: nn.Module) -> Callable[[], Tensor]:
        def run() -> Tensor:
            loss = F.cross_entropy(model(inputs), targets)
            loss.backward()
            return loss

        return run

    def sgd(model: nn.Module, gradients: int) -> Step:
        optimizer, run = torch.optim.SGD(model.parameters(), **SGD), closure(model)

        def step() -> None:
            for _ in range(gradients):
                optimizer.zero_grad()
                run()
            optimizer.step()

        return step

    def textbook(model: nn.Module) -> Step:
        weights, run = list(model.parameters()), closure(model)
        optimizer = TextbookSAM(weights, torch.optim.SGD(weights, **SGD))
        return lambda: optimizer.step(run)

    def samlite(model: nn.Module, kind: type[SAM], closures: int = 1) -> Step:
        run = closure(model)
        optimizer = kind(model.parameters(), torch.optim.SGD, rho=RHO, model=model, **SGD)
        return lambda: optimizer.step(*[run] * closures)

    return {
        "SGD": sgd(copy.deepcopy(network), 1),
        "two gradients": sgd(copy.deepcopy(network), 2),
        "textbook SAM": textbook(copy.deepcopy(network)),
        "samlite.SAM": samlite(copy.deepcopy(network), SAM),
        "FriendlySAM": samlite(copy.deepcopy(network), FriendlySAM),
        "AgnosticSAM": samlite(copy.deepcopy(network), AgnosticSAM, 2),
        "SAMPa": samlite(copy.deepcopy(network), SAMPa, 2),
    }


def measure(steps: dict[str, Step], count: int, repeats: int) -> dict[str, list[float]]:
    """Seconds a step of each variant, one figure a repeat."""
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(-1, repeats):  # the first round warms up
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            began = time.perf_counter()
            for _ in range(count):
                steps[name]()
            if repeat >= 0:
                seconds[name].append((time.perf_counter() - began) / count)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", default=",".join(CASES), help="which of mlp, resnet18; both by default")
    parser.add_argument("--repeats", type=int, help="instead of the number that each case has")
    arguments = parser.parse_args()
    console = Console()
    for case in arguments.case.split(","):
        title, build, shape, count, repeats = CASES[case]
        repeats = arguments.repeats or repeats
        torch.manual_seed(0)
        network, inputs, targets = build(), torch.randn(BATCH, *shape), torch.randint(10, (BATCH,))
        seconds = measure(variants(network, inputs, targets), count, repeats)
        table = Table(title=f"{title}, batch {BATCH}: median of {repeats} repeats of {count} steps")
        for column in ("variant", "ms a step", "in SGD steps", "min..max"):
            table.add_column(column, justify="left" if column == "variant" else "right")
        for name, times in seconds.items():
            ratios = [t / sgd for t, sgd in zip(times, seconds["SGD"], strict=True)]
            spread = f"{min(ratios):.3f}..{max(ratios):.3f}"
            table.add_row(name, f"{1e3 * median(times):.3f}", f"{median(ratios):.3f}", spread)
        console.print(table)
    console.print(
        f"samlite {__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.machine()}, {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
