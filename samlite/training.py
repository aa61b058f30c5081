"""Training: one loop for every task and optimizer, resumed exactly where it was stopped.

Runs are paired by their seed: the same seed and width give the same initial weights, the same splits
and the same order of batches to every optimizer. On one kind of CPU a run repeats bit for bit, whether or not
it was interrupted.
"""

import math
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import samlite
from samlite import tasks
from samlite.checkpoints import (
    load_checkpoint,
    load_model_weights,
    locked,
    read_json,
    save_checkpoint,
    save_model_weights,
    write_json,
    write_lines,
)
from samlite.config import Config, usable_device
from samlite.hessian import Hessian
from samlite.measure import SAMPLES
from samlite.models import parameter_count
from samlite.sam import SAM
from samlite.tasks import Splits, Task
from samlite.tracking import Tracker

__all__ = ["Config", "EpochRecord", "Run", "TrackedRecord", "TrainingError", "load_run", "train"]

SAVE_EVERY = 1.0  # seconds between checkpoints, where epochs are shorter: a stop costs no more than that


class TrainingError(RuntimeError):
    """Training cannot go on."""


@dataclass(frozen=True)
class EpochRecord:
    """The state after an epoch, at its final weights. Metrics are fractions or losses."""

    epoch: int
    train_loss: float
    train_metric: float
    validation_loss: float
    validation_metric: float
    lr: float
    gradient_evaluations: int  # so far: forward and backward passes over a batch
    seconds: float  # so far


@dataclass(frozen=True)
class TrackedRecord(EpochRecord):
    """With the largest eigenvalues of the Hessian of the training loss (without weight decay)."""

    eigenvalues: list[float | None]  # largest first; None for one that did not converge
    products: int  # Hessian-vector products that they took


@dataclass(frozen=True)
class Run:
    """A finished run: its final weights in evaluation mode, on the same device as its data."""

    folder: Path
    config: Config
    task: Task
    model: nn.Module
    data: Splits


def train(config: Config, out: Path | str, resume: bool = True) -> Iterator[EpochRecord]:
    """Train in the folder `out` and yield a record an epoch; the result is there when the iterator ends.

    A run that was stopped goes on from its last epoch; a finished one yields nothing. With `config.track` the records
    are `TrackedRecord`s, measured on the training samples (at most 8,192, drawn by the seed) in evaluation mode.
    Training itself is the same to the last bit. `Tracker` says what is in memory; the checkpoint grows by track + 1
    vectors of the number of parameters.

    Raises:
        ValueError: `out` holds another run or something else, or with resume=False anything at all.
        TrainingError: the loss is no longer finite. The last checkpoint before that is kept.
        BlockingIOError: another process trains in this folder.
    """
    out = Path(out)
    _check_folder(out, config, resume)  # before anything is written there
    with locked(out), _threads(config.threads):
        _check_folder(out, config, resume)  # again: another process may have come first
        if (out / "result.json").exists():
            return

        task, device = tasks.get(config.task).configured(config), usable_device(config.device)
        data = task.load(config.data, config.seed).to(device)
        model = initial_model(task, config, data).to(device)
        optimizer = _optimizer(model, config)
        order = torch.Generator().manual_seed(config.seed)
        tracker = _tracker(model, task, data.train, config) if config.track else None
        records: list[EpochRecord] = []
        best: dict[str, Any] = {}
        if (out / "checkpoint.pt").exists():
            records, best = _restore(out / "checkpoint.pt", model, optimizer, order, tracker)
            write_lines(out / "metrics.jsonl", map(asdict, records))
        elif not (out / "config.json").exists():
            write_json(out / "config.json", {**config.to_json(), **_environment()})

        gradient_evaluations = records[-1].gradient_evaluations if records else 0
        seconds_before = records[-1].seconds if records else 0.0
        started = saved = time.perf_counter()
        for epoch in range(len(records) + 1, config.epochs + 1):
            lr = learning_rate(config, epoch)
            for group in optimizer.param_groups:
                group["lr"] = lr

            losses = []
            with _random(config.seed, epoch, device):
                for inputs, targets in task.batches(model, data.train, config, order):
                    model.train()

                    def closure(inputs: Any = inputs, targets: Tensor = targets) -> Tensor:
                        nonlocal gradient_evaluations
                        gradient_evaluations += 1
                        optimizer.zero_grad()
                        loss: Tensor = task.loss(model(inputs), targets)
                        loss.backward()  # type: ignore[no-untyped-call]
                        return loss

                    losses.append(optimizer.step(closure).detach())

            train, validation = task.evaluate(model, data.train), task.evaluate(model, data.validation)
            if not all(map(math.isfinite, [*torch.stack(losses).tolist(), train.loss, validation.loss])):
                raise TrainingError(
                    f"the loss is no longer finite in epoch {epoch} at lr {lr:g}; try a smaller lr, in another folder"
                )
            tracked = tracker.measure() if tracker else None
            record = EpochRecord(
                epoch,
                train.loss,
                train.metric,
                validation.loss,
                validation.metric,
                lr,
                gradient_evaluations,
                seconds_before + time.perf_counter() - started,
            )
            records.append(TrackedRecord(**vars(record), **tracked) if tracked else record)
            if max(records, key=lambda r: task.rank(r.validation_metric, r.validation_loss)) is records[-1]:
                test = task.evaluate(model, data.test)
                best = {"epoch": epoch, "validation_metric": validation.metric, "test_metric": test.metric}
            if epoch == config.epochs or time.perf_counter() - saved > SAVE_EVERY:
                state = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "order": order.get_state(),
                    "records": [asdict(record) for record in records],
                    "best": best,
                    **({"tracker": tracker.state_dict()} if tracker else {}),
                }
                save_checkpoint(out / "checkpoint.pt", state)
                write_lines(out / "metrics.jsonl", map(asdict, records))
                saved = time.perf_counter()
            yield records[-1]

        save_model_weights(out / "model.safetensors", model)
        write_json(out / "result.json", _result(model, task, data.test, records[-1], best))


def learning_rate(config: Config, epoch: int) -> float:
    """The learning rate of an epoch, counted from 1."""
    done = (epoch - 1) / config.epochs
    if config.schedule == "cosine":
        return config.lr * (1 + math.cos(math.pi * done)) / 2
    passed = sum(done >= milestone for milestone in config.milestones)
    return float(config.lr / 10**passed)


def load_run(folder: Path | str, device: str | None = None) -> Run:
    """A finished run with its data. Raises ValueError where the folder holds none."""
    folder = Path(folder)
    if not (folder / "result.json").is_file():
        raise ValueError(f"{folder} must be the folder of a finished run; it has no result.json")
    config = Config.from_json(read_json(folder / "config.json"), folder / "config.json")
    task, place = tasks.get(config.task).configured(config), usable_device(device or config.device)
    data = task.load(config.data, config.seed).to(place)
    model = initial_model(task, config, data)
    load_model_weights(folder / "model.safetensors", model)
    return Run(folder, config, task, model.to(place).eval(), data)


def initial_model(task: Task, config: Config, data: Splits) -> nn.Module:
    """The network at its first weights, drawn on the CPU, so that every device starts from the same."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        try:
            return task.build(config.width, config.dropout, data.sizes)
        except (MemoryError, OverflowError, RuntimeError) as error:
            raise ValueError(f"width must leave a network that fits in memory, got {config.width}") from error


def _optimizer(model: nn.Module, config: Config) -> Any:  # whose step returns the loss as a tensor
    options: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.base == "sgd":
        options["momentum"] = config.momentum
    base = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.base]
    if config.optimizer == "sam":
        return SAM(model.parameters(), base, rho=config.rho, model=model, **options)
    return base(model.parameters(), **options)


def _tracker(model: nn.Module, task: Task, data: Any, config: Config) -> Tracker:
    parameters = parameter_count(model)
    if config.track > parameters:
        raise ValueError(f"track must be <= the number of parameters, {parameters}, got {config.track}")
    samples, _ = task.measured(model, data, SAMPLES, config.seed)
    return Tracker(Hessian(model, task.loss, samples), config.track)


def _check_folder(out: Path, config: Config, resume: bool) -> None:
    """Raise ValueError unless the folder is empty or, to resume, holds this very run."""
    if not out.exists() or all(path.name.startswith(".") for path in out.iterdir()):
        return
    if not resume:
        raise ValueError(f"{out} must be empty without resuming; choose another folder or delete this one")
    if not (out / "config.json").exists():
        raise ValueError(f"{out} must be empty or hold a run, but it has no config.json; choose another folder")
    found = Config.from_json(read_json(out / "config.json"), out / "config.json")
    differences = [
        f"{name} {value} there, {getattr(config, name)} now"
        for name, value in vars(found).items()
        if value != getattr(config, name)
    ]
    if differences:
        raise ValueError(f"{out} holds another run ({'; '.join(differences)}); choose another folder")


def _restore(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, order: torch.Generator, tracker: Tracker | None
) -> tuple[list[EpochRecord], dict[str, Any]]:
    state = load_checkpoint(path)
    kind = TrackedRecord if tracker else EpochRecord
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        order.set_state(state["order"])
        if tracker:
            tracker.load_state_dict(state["tracker"])
        return [kind(**record) for record in state["records"]], dict(state["best"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a checkpoint of this run; delete it to start afresh") from error


@contextmanager
def _random(seed: int, epoch: int, device: torch.device) -> Iterator[None]:
    """Dropout and the like draw from a state that the seed and the epoch decide, so a resumed run needs no other."""
    with torch.random.fork_rng([device.index or 0] if device.type == "cuda" else []):
        torch.manual_seed((seed * 1_000_003 + epoch) % 2**63)
        yield


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _environment() -> dict[str, Any]:
    return {
        "machine": platform.machine(),
        "versions": {
            "samlite": samlite.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _result(model: nn.Module, task: Task, test: Any, last: EpochRecord, best: dict[str, Any]) -> dict[str, Any]:
    test_scores = task.evaluate(model, test)
    return {
        "metric": task.metric,
        "final": {
            "train_loss": last.train_loss,
            "train_metric": last.train_metric,
            "validation_loss": last.validation_loss,
            "validation_metric": last.validation_metric,
            "test_loss": test_scores.loss,
            "test_metric": test_scores.metric,
            **{f"test_{name}": value for name, value in test_scores.others.items()},
        },
        "best": best,  # the epoch is selected on validation
        "interpolates": task.interpolates and last.train_loss < 1e-3 and (not task.classes or last.train_metric == 1),
        "parameters": parameter_count(model),
        "epochs": last.epoch,
        "gradient_evaluations": last.gradient_evaluations,
        "seconds": last.seconds,
    }
