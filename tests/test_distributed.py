"""Two processes that share a data set measure what one does with all of it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import Result, contents, process
from torch import nn

from samlite import Hessian, SAMPa, tasks
from samlite.training.config import Config
from samlite.training.optimizer import Closures, optimizer_of, parallel

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


def train(**choices: Any) -> torch.Tensor:
    """The weights after some steps of SAM in float64."""
    config = Config.of("digits", **{"width": 12, "optimizer": "sam", "batch_size": 36, "device": "cpu", **choices})
    task = replace(tasks.get("digits"), loss=nn.CrossEntropyLoss(ignore_index=3))  # parts of unequal denominators
    data = task.load(None, 0).train
    data = replace(data, inputs=data.inputs.double())
    torch.manual_seed(0)
    model = task.model(12).double()
    forward = parallel(model, config)
    optimizer = optimizer_of(model, config, None, forward)
    order = torch.Generator().manual_seed(0)
    for step in Closures(forward, task, config, optimizer, None).steps(data.batches(36, order)):
        optimizer.step(*step)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def sampa(group: Any = None) -> torch.Tensor:
    """The weights after some steps of SAMPa; with a group the two gradients of a step are on two processes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()
    inputs, targets = data()
    optimizer = SAMPa(
        model.parameters(), torch.optim.SGD, rho=0.1, model=model, lr=0.1, momentum=0.9, process_group=group
    )

    def closure(i: int) -> Any:
        def run() -> torch.Tensor:
            loss = nn.functional.cross_entropy(model(inputs[i : i + 9]), targets[i : i + 9])
            loss.backward()
            return loss

        return run

    for i in range(8):
        optimizer.step(closure(i), closure(i + 1) if i < 7 else None)
    return torch.cat([tensor.double().flatten() for tensor in model.state_dict().values()])


def skipping(group: Any = None) -> torch.Tensor:
    """The weights after two steps of SAMPa, and how many were skipped: the norm at y overflows, no other does."""
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = SAMPa([weight], torch.optim.SGD, rho=0.1, lmbda=0.0, lr=0.1, process_group=group)

    def closure(loss: Any) -> Any:
        def run() -> torch.Tensor:
            loss().backward()
            return loss().detach()

        return run

    first = closure(lambda: -100 * (weight + 0.05).relu().sum())  # leads y, not x, to 10
    second = closure(lambda: (weight + 1e200 * (weight - 5).relu()).sum())
    optimizer.step(first, second)
    optimizer.step(second)
    return torch.tensor([*weight.tolist(), optimizer.skipped], dtype=torch.float64)


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
    found["training"] = {
        "global": train(perturb="global"),
        "accumulated": train(perturb="global", accumulate=3),
        "local": train(perturb="local"),
        "local m": train(perturb="local", m=9),
        "sampa": train(optimizer="sampa"),
        "sampa, its gradients": train(optimizer="sampa", split="gradients", accumulate=2),
        "sampa in a script": sampa(dist.group.WORLD),
        "sampa, skipping": skipping(dist.group.WORLD),
    }
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


def test_training_on_two_ranks_is_that_on_one(found: Any) -> None:
    alone = {
        "global": train(),
        "accumulated": train(),
        "local": train(m=18),  # each rank is a group of m-SAM
        "sampa": train(optimizer="sampa"),
        "sampa, its gradients": train(optimizer="sampa", split="gradients"),
        "sampa in a script": sampa(),
        "sampa, skipping": skipping(),
    }
    for name, weights in alone.items():
        assert (found[0]["training"][name] - weights).abs().max() < 1e-12, name
    for name, weights in found[0]["training"].items():
        assert torch.equal(weights, found[1]["training"][name]), name
    assert not torch.equal(alone["global"], alone["local"])
    assert alone["sampa, skipping"].tolist() == [0, 0, 1]


def launched(*arguments: object, folder: Path, restarts: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD)]
    command += ["--max-restarts", str(restarts), "-m", "samlite.cli", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def torchrun(*arguments: object, folder: Path) -> Result:
    process = launched(*arguments, folder=folder)
    out, err = process.communicate(timeout=120)
    return Result(process.returncode, out, err)


@pytest.mark.slow
def test_the_terminal_trains_and_measures_under_torchrun(tmp_path: Path) -> None:
    options = ["--width", 8, "--epochs", 3, "--optimizer", "sam", "--json"]
    two = torchrun("train", *options, "--out", "two", folder=tmp_path)
    assert two.status == 0, two.err
    one = process("train", *options, "--out", "one", cwd=tmp_path)
    ends = [json.loads(ended)["result"]["final"] for ended in (one.out, two.out)]  # one document, of the first rank
    assert ends[1]["test_loss"] == pytest.approx(ends[0]["test_loss"], rel=1e-4)  # float32
    two = torchrun("sharpness", "two", "--moments", "--json", folder=tmp_path)
    one = process("sharpness", "two", "--moments", "--json", cwd=tmp_path)
    found = [json.loads(ended) for ended in (one.out, two.out)]
    assert found[1]["eigenvalues"]["values"] == pytest.approx(found[0]["eigenvalues"]["values"], rel=1e-9)
    assert found[1]["moments"]["powers"] == pytest.approx(found[0]["moments"]["powers"], rel=1e-9)


LONG = ["train", "--width", 8, "--epochs", 300, "--optimizer", "sam", "--out", "run"]


def killed_while_training(folder: Path, restarts: int) -> tuple[subprocess.Popen[str], float]:
    """Training on two ranks, the second of which is killed once there is something to go on from; and when."""
    started = launched(*LONG, folder=folder, restarts=restarts)
    deadline = time.monotonic() + 100
    while not (folder / "run" / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    ranks = subprocess.run(["pgrep", "-P", str(started.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    return started, time.monotonic()


def epochs(folder: Path) -> list[int]:
    return [json.loads(line)["epoch"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_killed_rank_ends_all_with_a_message_and_a_repeat_goes_on(tmp_path: Path) -> None:
    started, killed = killed_while_training(tmp_path, restarts=0)
    _, message = started.communicate(timeout=60)
    assert started.returncode != 0 and time.monotonic() - killed < 30
    assert "SIGKILL" in message
    ended = torchrun(*LONG, folder=tmp_path)
    assert ended.status == 0, ended.err
    assert epochs(tmp_path) == list(range(1, 301))


@pytest.mark.slow
def test_a_launcher_that_restarts_its_ranks_goes_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    started, _ = killed_while_training(tmp_path, restarts=1)
    _, message = started.communicate(timeout=120)
    assert started.returncode == 0, message
    assert epochs(tmp_path) == list(range(1, 301))
    whole = torchrun(*LONG[:-1], "whole", folder=tmp_path)
    assert whole.status == 0, whole.err
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_a_group_without_torch_distributed_is_refused() -> None:
    with pytest.raises(ValueError, match="process_group must go with an initialised torch.distributed"):
        Hessian(network(), nn.CrossEntropyLoss(), data(), process_group=object())
