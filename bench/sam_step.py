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
from collections.abc import Callable
from statistics import median

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samlite import SAM, AgnosticSAM, FriendlySAM, SAMPa

BATCH, RHO = 128, 0.05
SGD = {"lr": 0.01, "momentum": 0.9}
Step = Callable[[], object]


# name: (network, shape of one input, steps a repeat, repeats)
CASES = {
    "mlp": ("MLP 784-300-100-10", common.large_mlp, (784,), 20, 60),
    "resnet18": ("ResNet-18, 16 filters", common.image_resnet, (3, 32, 32), 1, 25),
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", default=",".join(CASES), help="which of mlp, resnet18; both by default")
    parser.add_argument("--repeats", type=int, help="instead of the number that each case has")
    arguments = parser.parse_args()
    console = common.console()
    for case in arguments.case.split(","):
        title, build, shape, count, repeats = CASES[case]
        repeats = arguments.repeats or repeats
        torch.manual_seed(0)
        network, inputs, targets = build(), torch.randn(BATCH, *shape), torch.randint(10, (BATCH,))
        seconds = common.alternate(variants(network, inputs, targets), repeats, count)
        title = f"{title}, batch {BATCH}: median of {repeats} repeats of {count} steps"
        table = common.table(title, "variant", "ms a step", "in SGD steps, median (range)")
        for name, times in seconds.items():
            ratios = [t / sgd for t, sgd in zip(times, seconds["SGD"], strict=True)]
            table.add_row(name, f"{1e3 * median(times):.3f}", common.spread(ratios, ".3f"))
        console.print(table)
    console.print(common.footer())


if __name__ == "__main__":
    main()
