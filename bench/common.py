"""What the benches share: the networks that several of them measure, one stopwatch, and how results are shown."""

import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console, JustifyMethod
from rich.table import Table
from torch import Tensor, nn

import samlite
from samlite.models import mlp, resnet18

CRITERION = nn.CrossEntropyLoss()
Work = Callable[[], Any]

# ---- Networks


def large_mlp() -> nn.Module:
    """784-300-100-10."""
    return mlp(784, 300, 100, 10)


def image_resnet(filters: int = 16) -> nn.Module:
    """A ResNet-18 on images of 0 to 255."""
    return resnet18(filters, mean=[0.5] * 3, std=[0.25] * 3, outputs=10)


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


def plain_resnet(width: int) -> nn.Module:
    """A ResNet-18 as torch initialises it, for which the figures of docs/benchmarks.md were measured."""
    stages = [Residual(width, width, 1), Residual(width, width, 1)]
    for w in (width, 2 * width, 4 * width):
        stages += [Residual(w, 2 * w, 2), Residual(2 * w, 2 * w, 1)]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, 10)
    return nn.Sequential(conv(3, width, 3, 1), nn.ReLU(), *stages, *head)


# ---- The stopwatch


def timed(work: Work) -> tuple[float, Any]:
    """The seconds of one call, until the device is done, and what it returned."""
    wait()
    began = time.perf_counter()
    result = work()
    wait()
    return time.perf_counter() - began, result


def seconds(work: Work) -> float:
    """The time of one call."""
    return timed(work)[0]


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def warm_seconds(work: Work) -> float:
    """The median of three calls or more, for a tenth of a second, after one that warms up."""
    seconds(work)
    times: list[float] = []
    while len(times) < 3 or sum(times) < 0.1:
        times.append(seconds(work))
    return median(times)


def alternate(contenders: Mapping[str, Work], repeats: int, count: int = 1) -> dict[str, list[float]]:
    """The seconds a call of each contender, in turns of `count` calls whose order rotates, after a round to warm up."""
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(-1, repeats):
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            elapsed = seconds(lambda name=name: [contenders[name]() for _ in range(count)])
            if repeat >= 0:
                times[name].append(elapsed / count)
    return times


# ---- Results


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """The median and the range."""
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def table(title: str, *columns: str) -> Table:
    """An empty table; all columns but the first are of numbers."""
    result = Table(title=title, title_justify="left", box=SIMPLE)
    for i, name in enumerate(columns):
        side: JustifyMethod = "right" if i else "left"
        result.add_column(name, justify=side)
    return result


def console() -> Console:
    """A wide one where the output is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 150)


def environment(packages: Sequence[str] = ("samlite", "torch")) -> dict[str, Any]:
    """Versions, threads and hardware."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    versions = {d.metadata["Name"].lower(): d.version for d in distributions()} | {"samlite": samlite.__version__}
    return {
        "packages": {name: versions.get(name, "not installed") for name in packages},
        "hardware": f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
    }


def footer(packages: Sequence[str] = ("samlite", "torch")) -> str:
    """The environment in a line."""
    where = environment(packages)
    versions = ", ".join(f"{name} {version}" for name, version in where["packages"].items())
    return f"{versions}, Python {platform.python_version()}; {where['hardware']}, {where['threads']} threads"
