"""Training: one loop for every task and optimizer, resumed exactly where it was stopped.

Runs are paired by their seed: the same seed and width give the same initial weights, the same splits
and the same order of batches to every optimizer. On one kind of CPU a run repeats bit for bit, whether or not
it was interrupted.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from samlite import distributed, tasks
from samlite.errors import UsageError
from samlite.files import locked
from samlite.training import network
from samlite.training.config import Config
from samlite.training.runs import RESULT, check_folder
from samlite.training.session import EpochRecord, Session


def train(config: Config, out: Path | str, resume: bool = True) -> Iterator[EpochRecord]:
    """Train in the folder `out` and yield a record an epoch; the result is there when the iterator ends.

    A run that was stopped goes on from its last epoch; a finished one yields nothing. With `config.track` the records
    are `TrackedRecord`s, measured on the training samples (at most 8,192, drawn by the seed) in evaluation mode.
    Training itself is the same to the last bit. `Tracker` says what is in memory; the checkpoint grows by track + 1
    vectors of the number of parameters.

    Under a launcher every process computes its part of each batch, and the first one evaluates and writes.

    Raises:
        UsageError: `out` holds another run or something else, or with resume=False anything at all.
        TrainingError: the loss is no longer finite. The last checkpoint before that is kept.
        BlockingIOError: another process trains in this folder.
    """
    with held(Path(out), config, resume) as finished:
        if finished:
            return
        session = Session(config, Path(out))
        for epoch in session.remaining():
            losses = _run_epoch(session, epoch)
            record = session.evaluate(epoch, losses)
            session.keep(record)
            yield record
        session.finish()


def _run_epoch(session: Session, epoch: int) -> list[Tensor]:
    """Step through all training batches, and return the loss of each."""
    config, optimizer, losses = session.config, session.optimizer, list[Tensor]()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, epoch)
    with network.random_state(config, epoch, session.device):
        for closures in session.closures.steps(session.batches()):
            session.model.train()
            for group in optimizer.param_groups:
                group["rho"] = config.rho if (session.steps + len(losses)) % config.every == 0 else 0.0
            losses.append(optimizer.step(*closures).detach())
            session.track(session.steps + len(losses))
    return losses


def learning_rate(config: Config, epoch: int) -> float:
    """The learning rate of an epoch, counted from 1."""
    done = (epoch - 1) / config.epochs
    if config.schedule == "cosine":
        return config.lr * (1 + math.cos(math.pi * done)) / 2
    passed = sum(done >= milestone for milestone in config.milestones)
    return float(config.lr / 10**passed)


@contextmanager
def held(out: Path, config: Config, resume: bool) -> Iterator[bool]:
    """The folder for this run alone, and whether the run is finished there."""
    world = distributed.world()
    if not tasks.get(config.task).fixed_samples and world > 1:
        raise UsageError(f"task {config.task} trains in one process, got {world}; start it without torchrun")
    check_folder(out, config, resume)  # before anything is written there
    with locked(out) if distributed.rank() == 0 else nullcontext(), threads(config.threads):
        check_folder(out, config, resume)  # again: another process may have come first
        yield distributed.broadcast((out / RESULT).exists)


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Compute with so many threads of the CPU inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
