"""The largest Hessian eigenvalue followed along training: products a checkpoint, and how right each value is.

    pip install ".[bench,data]"
    python bench/track.py [--data FOLDER] [--case mnist,resnet18] [--threads N] [--json FILE]

A checkpoint is the end of an epoch. The tracked value is what `samlite train --track 1` records (`samlite.tracking`);
its products count the one that looks for an eigenvalue that overtakes. The truth is a run from a random start to 1e-6,
verified; `cold` is what a random start takes to the same 1e-3, without and with the verification.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import common
import torch
from common import CRITERION, spread
from torch import Tensor, nn

from samlite import Hessian, tasks
from samlite.curvature.tracking import Tracker


@dataclass(frozen=True)
class Case:
    title: str
    model: nn.Module
    pair: tuple[Tensor, Tensor]  # trained and measured on
    lr: tuple[float, ...]  # an epoch
    momentum: float
    batch: int

    def epochs(self) -> Iterator[float]:
        """Train an epoch with plain SGD a step, and yield its learning rate; in evaluation mode then."""
        x, y = self.pair
        order = torch.Generator().manual_seed(0)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=self.lr[0], momentum=self.momentum)
        for lr in self.lr:
            optimizer.param_groups[0]["lr"] = lr
            self.model.train()
            for rows in torch.randperm(len(x), generator=order).split(self.batch):
                optimizer.zero_grad()
                CRITERION(self.model(x[rows]), y[rows]).backward()
                optimizer.step()
            self.model.eval()
            yield lr


def mnist(data: str, width: int, n: int, epochs: int, lr: float, momentum: float) -> Case:
    """The task's network; lr falls by 10 at half of the epochs and at 3/4 as in its recipe."""
    task = tasks.get("mnist")
    train = task.load(data, 0).train
    torch.manual_seed(0)
    rates = tuple(lr / 10 ** ((e >= epochs / 2) + (e >= 3 * epochs / 4)) for e in range(epochs))
    title = f"MLP {width}, MNIST, n {n}, lr {lr:g}, momentum {momentum:g}"
    return Case(title, task.model(width), (train.inputs[:n], train.targets[:n]), rates, momentum, 128)


def resnet(width: int, n: int, epochs: int, lr: float) -> Case:
    """Random images, labels by a random linear map."""
    torch.manual_seed(0)
    x = torch.randn(n, 3, 32, 32)
    y = (x.flatten(1) @ torch.randn(3072, 10)).argmax(1)
    title = f"ResNet-18, {width} filters, random images, n {n}, lr {lr:g}, momentum 0"
    return Case(title, common.plain_resnet(width), (x, y), (lr,) * epochs, 0.0, 64)


@dataclass(frozen=True)
class Checkpoint:
    lr: float
    products: int
    value: float | None
    truth: float
    settled: bool  # the truth is complete, and its error bound at most 1e-5
    cold: int
    cold_verified: int

    @property
    def error(self) -> float:
        """Relative, negative where too low; nan where no value was given."""
        return float("nan") if self.value is None else self.value / self.truth - 1


def follow(case: Case, check_every: int) -> list[Checkpoint]:
    tracker = Tracker(Hessian(case.model, CRITERION, case.pair), 1)
    checkpoints = []
    for epoch, lr in enumerate(case.epochs()):
        tracked = tracker.measure()
        if epoch % check_every and epoch + 1 < len(case.lr):
            continue
        hessian = tracker.hessian
        truth = hessian.eigenvalues(1, tol=1e-6, verify=True, seed=1)
        settled = truth.complete is True and float(truth.errors[0]) <= 1e-5 * float(truth.values[0])
        cold = hessian.eigenvalues(1, tol=1e-3, verify=False, seed=2).matvecs
        verified = hessian.eigenvalues(1, tol=1e-3, verify=True, seed=2).matvecs
        value, products = tracked["eigenvalues"][0], tracked["products"]
        checkpoints.append(Checkpoint(lr, products, value, float(truth.values[0]), settled, cold, verified))
    return checkpoints


def row(title: str, checkpoints: list[Checkpoint]) -> list[str]:
    later, known = checkpoints[1:], [each for each in checkpoints if each.value is not None]
    products = [each.products for each in later]
    errors = [abs(each.error) for each in known]
    cold, verified = ([getattr(each, name) for each in later] for name in ("cold", "cold_verified"))
    return [
        title,
        f"{checkpoints[0].products}",
        spread(products, "g"),
        f"{sum(count <= 4 for count in products)} of {len(products)}",
        f"{median(errors):.0e}, worst {max(errors):.0e}",
        f"{sum(error <= 1e-3 for error in errors)} of {len(checkpoints)}",
        spread(cold, "g"),
        spread(verified, "g"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="MNIST: a hub id or a folder of parquet files")
    parser.add_argument("--case", default="mnist,mnist-calm,resnet18", help="comma-separated")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--check-every", type=int, default=1, help="truth and cold starts at every so many checkpoints")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write every checkpoint there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    builders = {
        "mnist": lambda: mnist(options.data, 300, 4096, options.epochs, 0.1, 0.9),
        "mnist-calm": lambda: mnist(options.data, 300, 4096, options.epochs, 0.05, 0.0),
        "resnet18": lambda: resnet(4, 256, options.epochs, 0.05),
    }
    names = options.case.split(",")
    if unknown := set(names) - set(builders):
        parser.error(f"--case must be among {', '.join(builders)}, got {', '.join(sorted(unknown))}")
    if options.data is None and any(name.startswith("mnist") for name in names):
        parser.error("--data must name MNIST for these cases; or choose --case resnet18")

    console = common.console()
    columns = ("products after it", "at most 4", "relative error", "right to 1e-3", "cold", "cold, verified")
    table = common.table("", "case", "first", *columns)
    results = {}
    for name in names:
        began = time.perf_counter()
        case = builders[name]()
        results[name] = follow(case, options.check_every)
        table.add_row(*row(case.title, results[name]))
        console.print(f"{case.title}: {time.perf_counter() - began:.0f} s")
        for each in results[name]:
            status = "" if each.settled else "  truth not settled"
            console.print(f"  lr {each.lr:g}: {each.products} products, {each.truth:.6g} {each.error:+.1e}{status}")
    console.print(table)
    console.print(common.footer())
    if options.json:
        document = {name: [asdict(each) for each in checkpoints] for name, checkpoints in results.items()}
        options.json.write_text(json.dumps(document))


if __name__ == "__main__":
    main()
