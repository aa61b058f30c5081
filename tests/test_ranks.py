"""Two processes that share a data set measure what one does with all of it."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from samlite import Hessian

pytest.importorskip("samlite._C")

WORLD = 2


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def data() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(23, 5, generator=draw, dtype=torch.float64)
    targets = torch.randint(0, 3, (23,), generator=draw)
    targets[[2, 7, 20]] = -100  # so that batches have unequal denominators
    return inputs, targets


def measure(hessian: Hessian, unit: Any = "sample") -> dict[str, torch.Tensor]:
    top = hessian.eigenvalues(3, tol=1e-9, vectors=True)
    moments = hessian.moments(unit=unit, tol=1e-9)
    density = hessian.density(steps=20)
    vector = torch.randn(hessian.shape[0], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = {
        "product": hessian @ vector,
        "gradient": hessian.gradient(),
        "eigenvalues": top.values,
        "matvecs": torch.tensor([top.matvecs]),
        "powers": torch.tensor([moments.sharpness, *moments.powers.values()]),
        "trace": torch.tensor(hessian.trace().value),
        "frobenius": torch.tensor(hessian.frobenius().value),
        "density": density.density,
    }
    if unit == "sample":
        sharpness = hessian.sharpness()
        found["ascent"] = torch.tensor([sharpness.ascent, sharpness.average])
    return found


def max_lr(shard: Any, group: Any = None) -> torch.Tensor:
    options: dict[str, Any] = {"curvature": "ggn", "memory": "1GB", "process_group": group}
    return torch.tensor(Hessian(network(), nn.CrossEntropyLoss(), shard, **options).stability(0.1, 0.05).max_lr)


def shard(rank: int, unit: str) -> Any:
    """Unequal shares, in unequal numbers of batches; the last batch is smaller."""
    inputs, targets = data()
    mine = slice(0, 16) if rank == 0 else slice(16, 23)
    if unit == "pair":
        return inputs[mine], targets[mine]
    return list(zip(inputs[mine].split(4), targets[mine].split(4), strict=True))


def work(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    found = {
        unit: measure(
            Hessian(network(), nn.CrossEntropyLoss(), shard(rank, unit), process_group=dist.group.WORLD, memory="1GB"),
            "batch" if unit == "batch" else "sample",
        )
        for unit in ("pair", "batch")
    }
    found["pair"]["max_lr"] = max_lr(shard(rank, "pair"), dist.group.WORLD)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, str(folder)), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("unit", ["pair", "batch"])
def test_two_ranks_measure_what_one_process_does(found: Any, unit: str) -> None:
    inputs, targets = data()
    whole: Any = (inputs, targets)
    if unit != "pair":  # the batches of both ranks
        whole = [*shard(0, unit), *shard(1, unit)]
    alone = measure(
        Hessian(network(), nn.CrossEntropyLoss(), whole, memory="1GB"), "batch" if unit == "batch" else "sample"
    )
    for name, value in alone.items():
        size = value.double().abs().max()
        assert (found[0][unit][name] - value).abs().max() <= 1e-10 * size, name


@pytest.mark.parametrize("unit", ["pair", "batch"])
def test_every_rank_has_the_same_bits(found: Any, unit: str) -> None:
    for name, value in found[0][unit].items():
        assert torch.equal(value, found[1][unit][name]), name


def test_a_group_without_torch_distributed_is_refused() -> None:
    with pytest.raises(ValueError, match="process_group must go with an initialised torch.distributed"):
        Hessian(network(), nn.CrossEntropyLoss(), data(), process_group=object())
