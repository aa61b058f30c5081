"""What a second process brings: Hessian products with the samples shared out, and SAMPa with a gradient on each.

    python bench/ranks.py [--repeats N]

Every process computes with one thread, so that two of them are to one what two machines would be. The same network and
samples; times are medians, with their range, of repeats in one run.
"""

import argparse
import os
import socket
from collections.abc import Callable
from statistics import median
from typing import Any

import common
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from samlite import SAM, Hessian, SAMPa

SAMPLES, BATCH, STEPS = 4096, 1024, 5


def times(work: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each call, after one that warms up."""
    result = []
    for _ in range(repeats + 1):
        if dist.is_initialized():
            dist.barrier()
        result.append(common.seconds(work))
    return result[1:]


def problem() -> tuple[torch.nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return common.large_mlp(), torch.randn(SAMPLES, 784), torch.randint(10, (SAMPLES,))


def product(rank: int, world: int) -> Callable[[], Any]:
    model, inputs, targets = problem()
    group = dist.group.WORLD if world > 1 else None
    hessian = Hessian(
        model, torch.nn.CrossEntropyLoss(), (inputs[rank::world], targets[rank::world]), process_group=group
    )
    v = torch.randn(hessian.shape[0])
    return lambda: [hessian @ v for _ in range(STEPS)]


def steps(kind: type[SAM], world: int) -> Callable[[], Any]:
    model, inputs, targets = problem()
    options = {"process_group": dist.group.WORLD} if world > 1 else {}
    optimizer = kind(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.01, **options)

    def closure() -> Tensor:
        loss = F.cross_entropy(model(inputs[:BATCH]), targets[:BATCH])
        loss.backward()
        return loss

    closures = [closure, closure] if kind is SAMPa else [closure]
    return lambda: [optimizer.step(*closures) for _ in range(STEPS)]


def worker(rank: int, port: int, repeats: int, results: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    results_here = {"H v": times(product(rank, 2), repeats), "SAMPa": times(steps(SAMPa, 2), repeats)}
    if rank == 0:
        results.update(results_here)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    alone = {
        "H v": times(product(0, 1), repeats),
        "SAMPa": times(steps(SAMPa, 1), repeats),
        "SAM": times(steps(SAM, 1), repeats),
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(worker, (port, repeats, results), nprocs=2)
        both = dict(results)
    title = f"MLP 784-300-100-10, one thread a process: median of {repeats} repeats of {STEPS}"
    table = common.table(title, "what", "processes", "ms, median (range)", "of one process")
    rows = [("H v", 1, alone["H v"], alone["H v"]), ("H v", 2, both["H v"], alone["H v"])]
    rows += [("SAM step", 1, alone["SAM"], alone["SAM"]), ("SAMPa step", 1, alone["SAMPa"], alone["SAM"])]
    rows += [("SAMPa step", 2, both["SAMPa"], alone["SAM"])]
    for name, processes, seconds, base in rows:
        each = [1e3 * t / STEPS for t in seconds]
        table.add_row(name, str(processes), common.spread(each), f"{median(seconds) / median(base):.2f}")
    console = common.console()
    console.print(table)
    console.print(common.footer())


if __name__ == "__main__":
    main()
