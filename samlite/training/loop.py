"""Training: one loop for every task and optimizer, resumed exactly where it was stopped.

Runs are paired by their seed: the same seed and width give the same initial weights, the same splits
and the same order of batches to every optimizer. On one kind of CPU a run repeats bit for bit, whether or not
it was interrupted.
"""

import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import samlite
from samlite import distributed, tasks
from samlite.curvature.hessian import Hessian
from samlite.curvature.tracking import Tracker
from samlite.data.tensors import Batch, hold_out
from samlite.errors import UsageError
from samlite.models import parameter_count
from samlite.seeds import generator
from samlite.tasks import Splits, Task
from samlite.tasks.task import Scores
from samlite.training import network
from samlite.training.checkpoints import (
    check_types,
    load_checkpoint,
    locked,
    save_checkpoint,
    save_model_weights,
    write_json,
    write_lines,
)
from samlite.training.config import Config, task_of, usable_device
from samlite.training.documents import CONFIG, COUNT, NUMBER, RECORDS, RESULT, check, check_records
from samlite.training.measurements import SAMPLES
from samlite.training.optimizer import Closures, optimizer_of, parallel, scaler_of
from samlite.training.runs import LABELS, Run, check_folder, load_data, load_run, save_labels
from samlite.training.sparsity import masks_in

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
    steps: int  # of the optimizer so far
    gradient_evaluations: int  # so far: forward and backward passes over a batch
    seconds: float  # so far


@dataclass(frozen=True)
class TrackedRecord(EpochRecord):
    """With the largest eigenvalues of the Hessian of the training loss (without weight decay)."""

    eigenvalues: list[float | None]  # largest first; None for one that did not converge
    products: int  # Hessian-vector products that they took


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
    out = Path(out)
    if not tasks.get(config.task).fixed_samples and distributed.world() > 1:
        raise UsageError(
            f"task {config.task} trains in one process, got {distributed.world()}; start it without torchrun"
        )
    check_folder(out, config, resume)  # before anything is written there
    first = distributed.rank() == 0
    with locked(out) if first else nullcontext(), _threads(config.threads):
        check_folder(out, config, resume)  # again: another process may have come first
        if distributed.shared((out / RESULT).exists):
            return

        task, device = task_of(config), usable_device(config.device)
        data = load_data(task, config, out).to(device)
        path = out / "checkpoint.pt"
        state = _stopped(path) if path.exists() else {}
        model = network.initial(task, config, data, masks_in(state["model"]) if state else None)
        forward = parallel(model, config)
        scaler = scaler_of(config)
        optimizer = optimizer_of(model, config, scaler, forward)
        order = torch.Generator().manual_seed(config.seed)
        tracker = _tracker(model, task, data.train, config) if config.track else None
        records: list[EpochRecord] = []
        best: dict[str, Any] = {}
        if state:
            records, best = _restore(state, path, model, optimizer, scaler, order, tracker)
        distributed.together()  # nobody reads what the first process is about to write
        if first and state:
            write_lines(out / RECORDS, map(asdict, records))
        elif first and not (out / CONFIG).exists():
            write_json(out / CONFIG, {**config.to_json(), **_environment()})
        if first and config.label_noise and not (out / LABELS).exists():
            save_labels(data, out)

        steps = records[-1].steps if records else 0
        trained, held_out = data.train, None
        if config.optimizer == "agnostic":
            trained, rest = hold_out(data.train, draw=generator("held out", config.seed))
            held_out = _held_out(rest, config.batch_size, order)
        closures = Closures(forward, task, config, optimizer, held_out)
        gradients_before = records[-1].gradient_evaluations if records else 0
        seconds_before = records[-1].seconds if records else 0.0
        started = saved = time.perf_counter()
        for epoch in range(len(records) + 1, config.epochs + 1):
            if _stalled(best, epoch, config):
                break
            lr = learning_rate(config, epoch)
            for group in optimizer.param_groups:
                group["lr"] = lr

            losses: list[Tensor] = []
            with network.random_state(config, epoch, device):
                for step in closures.steps(task.batches(model, trained, config.batch_size, order, config.augment)):
                    model.train()
                    for group in optimizer.param_groups:
                        group["rho"] = config.rho if (steps + len(losses)) % config.every == 0 else 0.0
                    losses.append(optimizer.step(*step).detach())

            steps += len(losses)
            train, validation = (_evaluated(task, model, part) for part in (data.train, data.validation))
            finite = all(map(math.isfinite, [*torch.stack(losses).tolist(), train.loss, validation.loss]))
            if not all(distributed.gathered(finite)):
                raise TrainingError(
                    f"the loss is no longer finite in epoch {epoch} at lr {lr:g}; try a smaller lr, in another folder"
                )
            tracked = distributed.shared(tracker.measure) if tracker else None
            record = EpochRecord(
                epoch,
                train.loss,
                train.metric,
                validation.loss,
                validation.metric,
                lr,
                steps,
                gradients_before + closures.total(),
                seconds_before + time.perf_counter() - started,
            )
            records.append(TrackedRecord(**vars(record), **tracked) if tracked else record)
            if max(records, key=lambda r: task.rank(r.validation_metric, r.validation_loss)) is records[-1]:
                test = _evaluated(task, model, data.test)
                best = {"epoch": epoch, "validation_metric": validation.metric, "test_metric": test.metric}
                if config.patience:
                    best["model"] = deepcopy(model.state_dict())  # to return to
            ends = epoch == config.epochs or _stalled(best, epoch + 1, config)
            if first and (ends or time.perf_counter() - saved > SAVE_EVERY):
                state = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    **({"scaler": scaler.state_dict()} if scaler else {}),
                    "order": order.get_state(),
                    "records": [asdict(record) for record in records],
                    "best": best,
                    **({"tracker": tracker.state_dict()} if tracker else {}),
                }
                save_checkpoint(out / "checkpoint.pt", state)
                write_lines(out / RECORDS, map(asdict, records))
                saved = time.perf_counter()
            yield records[-1]

        if not first:
            return
        end = records[-1]
        if config.patience:
            model.load_state_dict(best.pop("model"))
            end = records[best["epoch"] - 1]
        save_model_weights(out / "model.safetensors", model)
        write_json(out / RESULT, _result(model, task, config, data, records[-1], end, best))


def learning_rate(config: Config, epoch: int) -> float:
    """The learning rate of an epoch, counted from 1."""
    done = (epoch - 1) / config.epochs
    if config.schedule == "cosine":
        return config.lr * (1 + math.cos(math.pi * done)) / 2
    passed = sum(done >= milestone for milestone in config.milestones)
    return float(config.lr / 10**passed)


def _held_out(data: Any, batch_size: int, order: torch.Generator) -> Callable[[], Batch]:
    """Gives batches of these samples, drawn with replacement."""

    def draw() -> Batch:
        chosen = torch.randint(len(data), (min(batch_size, len(data)),), generator=order)
        batch: Batch = next(data[chosen.to(data.targets.device)].batches(batch_size))
        return batch

    return draw


def _tracker(model: nn.Module, task: Task, data: Any, config: Config) -> Tracker:
    parameters = parameter_count(model)
    if config.track > parameters:
        raise UsageError(f"track must be <= the number of parameters, {parameters}, got {config.track}")
    samples, _ = task.measured(model, data, SAMPLES, config.seed)
    return Tracker(Hessian(model, task.loss, samples), config.track)


def _evaluated(task: Task, model: nn.Module, data: Any) -> Scores:
    """By the first process, for all."""
    return distributed.shared(lambda: task.evaluate(model, data))


def _stalled(best: dict[str, Any], epoch: int, config: Config) -> bool:
    """Whether training stops before this epoch, as none of the last `patience` was the best on validation."""
    return bool(config.patience and best and epoch - best["epoch"] > config.patience)


def _stopped(path: Path) -> dict[str, Any]:
    """The state of a run that was stopped. Raises UsageError where it is not one that training has saved."""
    state = load_checkpoint(path)
    weights, numbers = state.get("model"), state.get("best")
    try:
        if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
            raise UsageError("it holds no weights by name")
        check_records(state.get("records"), *(field.name for field in fields(EpochRecord)))
        needed = ("epoch", "validation_metric", "test_metric")
        check(numbers, {"epoch": COUNT, "validation_metric": NUMBER, "test_metric": NUMBER}, needed)
    except UsageError as error:
        raise UsageError(f"{path} is not a checkpoint of a run ({error}); delete it to start afresh") from None
    return state


def _restore(
    state: dict[str, Any],
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    order: torch.Generator,
    tracker: Tracker | None,
) -> tuple[list[EpochRecord], dict[str, Any]]:
    kind = TrackedRecord if tracker else EpochRecord
    try:
        check_types(model, state["model"], path)
        model.load_state_dict(state["model"])
        options = [{name: value for name, value in g.items() if name != "params"} for g in optimizer.param_groups]
        _check_kept(state["optimizer"], optimizer)
        optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(optimizer.param_groups, options, strict=True):
            group.update(own)  # which the config decides
        if scaler:
            scaler.load_state_dict(state["scaler"])
        order.set_state(state["order"])
        if tracker:
            tracker.load_state_dict(state["tracker"])
        best = dict(state["best"])
        if "model" in best:
            check_types(model, best["model"], path)
            deepcopy(model).load_state_dict(best["model"])
        return [kind(**record) for record in state["records"]], best
    except Exception as error:  # damage shows as many kinds of error
        raise UsageError(f"{path} is not a checkpoint of this run; delete it to start afresh") from error


def _check_kept(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Raise UsageError where what was kept for a parameter is not tensors like it, or not the same for all of them."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, kept in saved["state"].items():
        for name, value in kept.items():
            shape = torch.Size() if name == "step" else parameters[number].shape
            fits = isinstance(value, Tensor) and value.is_floating_point() and value.shape == shape
            if not fits and value is not None:
                raise UsageError(f"{name} must be floating-point numbers of shape {tuple(shape)}")
    if len({frozenset(kept) for kept in saved["state"].values()}) > 1:
        raise UsageError("the same must be kept for every parameter")


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
        "processes": distributed.world(),
        "versions": {
            "samlite": samlite.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _result(
    model: nn.Module,
    task: Task,
    config: Config,
    data: Splits,
    last: EpochRecord,
    end: EpochRecord,
    best: dict[str, Any],
) -> dict[str, Any]:
    """Of a model at the weights it ends with: those after the last epoch, or the best one with patience."""
    test = task.evaluate(model, data.test)
    return {
        "metric": task.metric,
        "final": {
            "train_loss": end.train_loss,
            "train_metric": end.train_metric,
            "validation_loss": end.validation_loss,
            "validation_metric": end.validation_metric,
            "test_loss": test.loss,
            "test_metric": test.metric,
            **{f"test_{name}": value for name, value in test.others.items()},
        },
        "best": best,  # the epoch is selected on validation
        "interpolates": task.fixed_samples and end.train_loss < 1e-3 and (not task.classes or end.train_metric == 1),
        "parameters": parameter_count(model),
        **({"dense_parameters": parameter_count(network.dense(task, config, data))} if config.sparsity else {}),
        **({"label_noise": _noise(config, data)} if config.label_noise else {}),
        "epochs": last.epoch,
        "gradient_evaluations": last.gradient_evaluations,
        "seconds": last.seconds,
    }


def _noise(config: Config, data: Splits) -> dict[str, Any]:
    """What was done to the training labels, which the run's folder holds."""
    changed = round(config.label_noise * int((data.train.targets >= 0).sum()))
    return {"rate": config.label_noise, "seed": config.seed, "changed": changed}
