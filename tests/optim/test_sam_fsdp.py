"""Two processes that share the weights by `fully_shard` train as one process with all of them."""

import os
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from samlite import SAM, AgnosticSAM, FriendlySAM, SAMPa

pytestmark = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="fully_shard of this torch does not work on a CPU"
)

WORLD, STEPS = 2, 4
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ADAM = partial(torch.optim.AdamW, lr=0.05)
# name: (class, base optimizer, options); the weights have 1, 3 and 5 rows, so that shards are unequal or empty
CASES: dict[str, tuple[type[SAM], Any, dict[str, Any]]] = {
    "sam": (SAM, SGD, {}),
    "adam": (SAM, ADAM, {}),
    "adaptive": (SAM, SGD, {"adaptive": True, "rho": 0.5}),
    "unnormalized": (SAM, SGD, {"normalize": False}),
    "clipped": (SAM, SGD, {"max_norm": 0.05}),
    "plain, clipped": (SAM, SGD, {"rho": 0.0, "max_norm": 0.05}),
    "m": (SAM, SGD, {"m": 1}),
    "friendly": (FriendlySAM, ADAM, {}),
    "agnostic": (AgnosticSAM, SGD, {}),
    "sampa": (SAMPa, ADAM, {}),
}
Closures = Callable[[int], list[Callable[[], Tensor]]]  # of a batch


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def sharded(part: Callable[[nn.Module], nn.Module] = lambda model: model) -> nn.Module:
    model = network()
    fully_shard(part(model), mesh=init_device_mesh("cpu", (WORLD,)))
    return model


def closures_of(model: nn.Module, mine: slice, scaler: Any = None) -> Closures:
    """Two micro-batches of each batch; `mine` are this process's rows of them."""
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(2 * STEPS, 2, 8, 4, generator=draw, dtype=torch.float64)

    def closure(x: Tensor) -> Tensor:
        loss = (model(x).squeeze(1) - x.sum(1).sin()).square().mean()
        (scaler.scale(loss) if scaler else loss).backward()
        return loss

    return lambda i: [partial(closure, x[mine]) for x in inputs[i]]


def train(optimizer: SAM, closures: Closures, steps: range = range(STEPS)) -> None:
    for i in steps:
        second = {AgnosticSAM: [closures(STEPS + i)], SAMPa: [closures(i + 1)]}.get(type(optimizer), [])
        optimizer.step(closures(i), *second)


def whole(model: nn.Module) -> Tensor:
    """All weights, gathered from the processes."""
    weights: list[Any] = [weight.detach() for weight in model.parameters()]
    return torch.cat([(w.full_tensor() if hasattr(w, "full_tensor") else w).flatten() for w in weights])


def trained(name: str, model: nn.Module, mine: slice) -> Tensor:
    kind, base, options = CASES[name]
    train(kind(model.parameters(), base, **{"rho": 0.1, **options}), closures_of(model, mine))
    return whole(model)


def scaled(model: nn.Module, mine: slice) -> Tensor:
    """Trained with a gradient scaler; the weights, and its scale after a last step that it skips."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = SAM(model.parameters(), SGD, rho=0.1, scaler=scaler)
    closures = closures_of(model, mine, scaler)
    train(optimizer, closures)

    def broken() -> Tensor:
        loss = closures(0)[0]()
        poison(model)
        return loss

    optimizer.step(broken)
    return torch.cat([whole(model), torch.tensor([scaler.get_scale(), optimizer.skipped])])


def poison(model: nn.Module) -> None:
    """Make the first number of the first gradient NaN: it lies in the first process."""
    grad: Any = next(model.parameters()).grad
    local = grad.to_local() if hasattr(grad, "to_local") else grad
    if not dist.is_initialized() or dist.get_rank() == 0:
        local[0, 0] = float("nan")


def after_an_error(model: nn.Module, mine: slice) -> Tensor:
    """How far a step moves the weights whose second pass fails."""
    before, closures, passes = whole(model), closures_of(model, mine), iter([False, True])

    def closure() -> Tensor:
        loss = closures(0)[0]()
        if next(passes):
            raise InterruptedError
        return loss

    with pytest.raises(InterruptedError):
        SAM(model.parameters(), SGD, rho=0.5).step(closure)
    return whole(model) - before


def resumed(mine: slice, folder: Path, kind: type[SAM], base: Any) -> dict[str, Tensor]:
    """Trained in one go, and with a stop half way from which torch.distributed.checkpoint goes on."""
    straight = sharded()
    train(kind(straight.parameters(), base, rho=0.1), closures_of(straight, mine))
    model = sharded()
    optimizer = kind(model.parameters(), base, rho=0.1)
    train(optimizer, closures_of(model, mine), range(2))
    dcp.save(
        {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder
    )
    model = sharded()
    optimizer = kind(model.parameters(), base, rho=0.3)
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    train(optimizer, closures_of(model, mine), range(2, STEPS))
    return {"straight": whole(straight), "resumed": whole(model)}


def refused(mine: slice) -> dict[str, str]:
    """What is said where shards cannot work."""
    model = FullyShardedDataParallel(network(), use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = SAM(model.parameters(), SGD, rho=0.1)
    with pytest.raises(ValueError) as old:
        optimizer.step(closures_of(model, mine)(0))
    with pytest.raises(ValueError) as exchange:
        SAMPa(sharded().parameters(), SGD, process_group=dist.group.WORLD)
    return {"FSDP1": str(old.value), "SAMPa": str(exchange.value)}


def work(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    mine = slice(rank, None, WORLD)
    found: dict[str, Any] = {name: trained(name, sharded(), mine) for name in CASES}
    everything = slice(None)  # as nobody averages the gradients of weights that are not sharded
    found["mixed"] = trained("clipped", sharded(lambda model: model[2]), everything)
    found["scaled"] = scaled(sharded(), mine)
    found["error"] = after_an_error(sharded(), mine)
    for kind, base in ((SAM, ADAM), (FriendlySAM, ADAM), (FriendlySAM, SGD)):
        found[f"{kind.__name__} {base.func.__name__}"] = resumed(mine, Path(folder) / f"{kind}{base}", kind, base)
    found["refused"] = refused(mine)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("fsdp")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, str(folder)), nprocs=WORLD)
    yield [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


ROUNDING = {"rtol": 1e-9, "atol": 1e-11}  # float64; Adam divides by roots of squared gradients


def test_two_processes_with_shards_take_the_steps_of_one(found: Any) -> None:
    for name in [*CASES, "mixed"]:
        alone = trained("clipped" if name == "mixed" else name, network(), slice(None))
        assert not torch.equal(alone, whole(network()))
        for rank in range(WORLD):
            torch.testing.assert_close(found[rank][name], alone, **ROUNDING, msg=name)


def test_a_scaler_skips_on_both_processes_what_is_not_finite_on_one(found: Any) -> None:
    alone = scaled(network(), slice(None))
    assert alone[-2:].tolist() == [2.0, 1.0]
    for rank in range(WORLD):
        torch.testing.assert_close(found[rank]["scaled"], alone, **ROUNDING)


def test_an_error_in_the_second_pass_leaves_no_shard_perturbed(found: Any) -> None:
    for rank in range(WORLD):
        assert torch.equal(found[rank]["error"], torch.zeros_like(found[rank]["error"]))


def test_a_run_resumed_by_torch_distributed_checkpoint_equals_an_uninterrupted_one(found: Any) -> None:
    for name in ("SAM AdamW", "FriendlySAM AdamW", "FriendlySAM SGD"):
        for rank in range(WORLD):
            assert torch.equal(found[rank][name]["resumed"], found[rank][name]["straight"]), name


def test_shards_that_cannot_work_are_refused_in_a_line(found: Any) -> None:
    refused = found[0]["refused"]
    assert refused["FSDP1"] == "params must not be those of FullyShardedDataParallel; use fully_shard (FSDP2)"
    assert refused["SAMPa"].startswith("process_group must not go with sharded weights, got a DTensor")
