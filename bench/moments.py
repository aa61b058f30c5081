"""Products with the moments of per-sample Hessians, M_k v for k = 1 .. 4: samlite beside torch.func's vmap.

    pip install ".[bench]"
    python bench/moments.py [--case mlp-small,mlp-mnist,resnet18,transformer] [--repeats 5]
    python bench/moments.py --curves moments.png

The unit is the time of one full gradient on the same data, measured beside every run. The vmap way composes Hessian-
vector products of single samples, mapped over samples in chunks whose directions take at most 256 MB; it is timed on
the first samples of the data and scaled to all, as it is linear in them. Both must agree on those samples.

--curves draws time and peak memory of M_4 v against the number of samples, each measured in a process of its own.
"""

import argparse
import json
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import common
import hessian
import torch
from common import CRITERION, seconds, spread
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from samlite import Hessian

ORDERS = (1, 2, 3, 4)
DIRECTIONS = 2**28  # bytes of the directions of a chunk, for vmap


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(1000, 64), nn.Linear(64, 10)
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(tokens)).mean(1))


@dataclass
class Case:
    title: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    mapped: int  # samples that vmap is timed on


CASES = {
    **{
        name: Case(case.title, case.build, lambda case=case: torch.randn(case.shape), mapped)
        for (name, case), mapped in zip(hessian.CASES.items(), (1024, 128, 16), strict=True)
    },
    "transformer": Case(
        "transformer, 2 layers of 64, n 256, 32 tokens", Transformer, lambda: torch.randint(0, 1000, (256, 32)), 32
    ),
}


def by_vmap(model: nn.Module, v: Tensor, x: Tensor, y: Tensor, order: int) -> Tensor:
    """M_order v over the samples given: (p,)."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    parts = v.split([p.numel() for p in params.values()])
    direction = {name: part.view_as(p) for (name, p), part in zip(params.items(), parts, strict=True)}

    def power(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        def loss(params: dict[str, Tensor]) -> Tensor:
            return CRITERION(functional_call(model, params, (x[None],)), y[None])

        u = direction
        for _ in range(order):
            u = jvp(grad(loss), (params,), (u,))[1]
        return u

    rows = max(1, DIRECTIONS // (4 * len(v)))
    total = torch.zeros_like(v)
    for chunk in zip(x.split(rows), y.split(rows), strict=True):
        total += torch.cat([part.sum(0).flatten() for part in vmap(power)(*chunk).values()])
    return total / len(x)


def measure(case: Case, repeats: int) -> Table:
    torch.manual_seed(0)
    model, x = case.build().eval(), case.inputs()
    y = torch.randint(0, 10, (len(x),))
    few = slice(0, case.mapped)
    chains = Hessian(model, CRITERION, (x, y)).samples("sample").operator
    v = torch.randn(sum(p.numel() for p in model.parameters()))
    columns = ("", "gradients, median (range)", "vmap", "times as fast", "relative difference")
    table = common.table(f"{case.title}, p {len(v):,}", *columns)

    def gradient() -> None:
        torch.autograd.grad(CRITERION(model(x), y), list(model.parameters()))

    with sdpa_kernel(SDPBackend.MATH):
        ours = Hessian(model, CRITERION, (x[few], y[few])).samples("sample").operator.apply(v, max(ORDERS))
        gradient(), chains.apply(v, max(ORDERS))  # warm
        own: dict[int, list[float]] = {k: [] for k in ORDERS}
        theirs: dict[int, list[float]] = {k: [] for k in ORDERS}
        for repeat in range(repeats):
            for k in ORDERS:
                unit = seconds(gradient)
                mine = seconds(lambda k=k: chains.apply(v, k))
                unit = (unit + seconds(gradient)) / 2
                own[k].append(mine / unit)
                if repeat < 3:  # slow, and far beyond the noise
                    scale = len(x) / case.mapped
                    theirs[k].append(seconds(lambda k=k: by_vmap(model, v, x[few], y[few], k)) * scale / unit)
        for k in ORDERS:
            right = by_vmap(model, v, x[few], y[few], k)
            difference = float((ours[k - 1] - right).norm() / right.norm())
            mine, other = median(own[k]), median(theirs[k])
            table.add_row(f"M_{k} v", spread(own[k]), f"{other:.1f}", f"{other / mine:.1f}", f"{difference:.0e}")
    more = [(last - first) / (max(ORDERS) - 1) for first, last in zip(own[1], own[max(ORDERS)], strict=True)]
    table.add_row("one more order", spread(more), "", "", "")
    return table


# ---- Curves ----------------------------------------------------------------------------------------------

SAMPLES = (512, 1024, 2048, 4096, 8192, 16384)
BUDGETS = ("16MB", "64MB", "1GB")


def probe(n: int, memory: str) -> None:
    """M_4 v on the large MLP in this process: prints seconds and the peak of memory above the start, as JSON."""
    torch.manual_seed(0)
    model, x, y = common.large_mlp(), torch.randn(n, 784), torch.randint(0, 10, (n,))
    v = torch.randn(sum(p.numel() for p in model.parameters()))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    chains = Hessian(model, CRITERION, (x, y), memory=memory).samples("sample").operator
    times = [seconds(lambda: chains.apply(v, 4)) for _ in range(6)][1:]
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(json.dumps({"n": n, "memory": memory, "seconds": median(times), "peak": peak, "kept": chains.kept_bytes}))


def curves(path: Path, console: Console) -> None:
    from matplotlib.figure import Figure

    table = common.table("", "samples", *(f"{budget}: s, peak MB" for budget in BUDGETS))
    runs: dict[str, list[dict[str, Any]]] = {budget: [] for budget in BUDGETS}
    for n in SAMPLES:
        for budget in BUDGETS:
            child = [sys.executable, __file__, "--probe", str(n), budget]
            runs[budget].append(json.loads(subprocess.check_output(child, text=True)))
        cells = [f"{rows[-1]['seconds']:.3f}, {rows[-1]['peak']:.0f}" for rows in runs.values()]
        table.add_row(str(n), *cells)
    console.print(table)
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    for budget, rows in runs.items():
        time_axes.loglog(SAMPLES, [row["seconds"] for row in rows], "o-", label=f"memory={budget}")
        memory_axes.loglog(SAMPLES, [max(row["peak"], 1) for row in rows], "o-", label=f"memory={budget}")
    linear = [runs[BUDGETS[-1]][0]["seconds"] * n / SAMPLES[0] for n in SAMPLES]
    time_axes.loglog(SAMPLES, linear, "--", color="0.6", label="linear")
    time_axes.set(xlabel="samples", ylabel="seconds", title="time of M₄ v")
    memory_axes.set(xlabel="samples", ylabel="MB above the data", title="peak memory")
    for axes in (time_axes, memory_axes):
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default=",".join(CASES), help="which, separated by commas (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each product (%(default)s)")
    parser.add_argument("--curves", type=Path, metavar="FILE.png", help="only draw the curves")
    parser.add_argument("--probe", nargs=2, metavar=("N", "MEMORY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.probe:
        return probe(int(args.probe[0]), args.probe[1])
    names = args.case.split(",")
    if not set(names) <= set(CASES):
        parser.error(f"--case must be some of {','.join(CASES)}, got {args.case}")
    warnings.filterwarnings("ignore")
    console = common.console()
    if args.curves:
        return curves(args.curves, console)
    console.print(common.footer())
    for name in names:
        console.print(measure(CASES[name], args.repeats))


if __name__ == "__main__":
    main()
