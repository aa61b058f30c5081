"""What a run in training consists of, and what is kept of it."""

import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import samlite
from samlite import distributed
from samlite.curvature.hessian import Hessian
from samlite.curvature.tracking import Tracker
from samlite.data.tensors import Batch, Splits, hold_out
from samlite.documents import COUNT, NUMBER, check
from samlite.errors import UsageError
from samlite.files import write_json, write_lines
from samlite.models import parameter_count
from samlite.seeds import generator
from samlite.tasks import Task
from samlite.tasks.task import Scores
from samlite.training import network
from samlite.training.checkpoints import check_types, load_checkpoint, save_checkpoint, save_model_weights
from samlite.training.config import Config, task_of, usable_device
from samlite.training.measurements import SAMPLES
from samlite.training.optimizer import Closures, optimizer_of, parallel, scaler_of
from samlite.training.runs import (
    CHECKPOINT,
    CONFIG,
    LABELS,
    RECORDS,
    RESULT,
    WEIGHTS,
    check_records,
    load_data,
    save_labels,
)
from samlite.training.sparsity import masks_in

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

    def line(self) -> dict[str, Any]:
        """Its fields, those that it has."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class TrackedRecord(EpochRecord):
    """With the largest eigenvalues of the Hessian of the training loss (without weight decay)."""

    eigenvalues: list[float | None]  # largest first; None for one that did not converge
    products: int  # Hessian-vector products that they took
    measures: dict[str, float | None] | None = None  # by name; None for one that did not apply
    errors: dict[str, float] | None = None  # of measures that are not exact
    between: list[dict[str, Any]] | None = None  # what was tracked within the epoch: the same by `step`


class Session:
    """A run in training: its data, network and optimizer, as the folder says where a run was stopped there.

    The folder belongs to the first process, which alone writes.

    Args:
        data: what `load_data` gives, where it is loaded already.
        members: how many runs are trained as one batch, and share the time.
    """

    def __init__(self, config: Config, out: Path, data: Splits | None = None, members: int = 1) -> None:
        self.config, self.out, self.first = config, out, distributed.rank() == 0
        self.task, self.device = task_of(config), usable_device(config.device)
        self.members = members
        self.data: Splits = data or load_data(self.task, config, out).to(self.device)
        path = out / CHECKPOINT
        state = _stopped(path) if path.exists() else {}
        self.model = network.initial(self.task, config, self.data, masks_in(state["model"]) if state else None)
        forward = parallel(self.model, config)
        self.scaler = scaler_of(config)
        self.optimizer = optimizer_of(self.model, config, self.scaler, forward)
        self.order = torch.Generator().manual_seed(config.seed)
        self.tracker = (
            _tracker(self.model, self.task, self.data.train, config, self.optimizer) if config.track else None
        )
        self._between: list[dict[str, Any]] = []
        self.records: list[EpochRecord] = []
        self.best: dict[str, Any] = {}
        if state:
            self.load_state_dict(state, path)
        distributed.barrier()  # nobody reads what the first process is about to write
        if self.first:
            self._begin(bool(state))
        self.trained, held_out = self.data.train, None
        if config.optimizer == "agnostic":
            self.trained, rest = hold_out(self.data.train, draw=generator("held out", config.seed))
            held_out = _held_out(rest, config.batch_size, self.order)
        self.closures = Closures(forward, self.task, config, self.optimizer, held_out)
        self._gradients_before = self.records[-1].gradient_evaluations if self.records else 0
        self._seconds_before = self.records[-1].seconds if self.records else 0.0
        self._started = self._saved = time.perf_counter()

    @property
    def steps(self) -> int:
        """How many steps the optimizer had taken after the last epoch."""
        return self.records[-1].steps if self.records else 0

    def _begin(self, stopped: bool) -> None:
        """Write what a run's folder holds from the start."""
        if stopped:
            write_lines(self.out / RECORDS, [record.line() for record in self.records])
        elif not (self.out / CONFIG).exists():
            batched = {"batched": self.members} if self.members > 1 else {}
            write_json(self.out / CONFIG, {**self.config.to_json(), **_environment(), **batched})
        if self.config.label_noise and not (self.out / LABELS).exists():
            save_labels(self.data, self.out)

    def remaining(self) -> Iterator[int]:
        """The epochs to come, counted from 1, until none of the last `patience` was the best on validation."""
        for epoch in range(len(self.records) + 1, self.config.epochs + 1):
            if self._stalled(epoch):
                return
            yield epoch

    def _stalled(self, epoch: int) -> bool:
        return bool(self.config.patience and self.best and epoch - self.best["epoch"] > self.config.patience)

    def batches(self) -> Iterator[Batch]:
        """The training batches of an epoch."""
        config = self.config
        return self.task.batches(self.model, self.trained, config.batch_size, self.order, config.augment)

    def evaluate(self, epoch: int, losses: list[Tensor], scores: tuple[Scores, Scores] | None = None) -> EpochRecord:
        """The record of an epoch with these losses of its steps. Raises TrainingError where one is not finite.

        `scores` are those on training and validation data, where they are known.
        """
        steps = self.steps + len(losses)
        train, validation = scores or (self._scores(self.data.train), self._scores(self.data.validation))
        finite = all(map(math.isfinite, [*torch.stack(losses).tolist(), train.loss, validation.loss]))
        lr = self.optimizer.param_groups[0]["lr"]
        if not all(distributed.all_gather(finite)):
            raise TrainingError(
                f"the loss is no longer finite in epoch {epoch} at lr {lr:g}; try a smaller lr, in another folder"
            )
        tracked = self._measured()
        if tracked and self.config.track_every:
            tracked["between"], self._between = self._between, []
        record = EpochRecord(
            epoch=epoch,
            train_loss=train.loss,
            train_metric=train.metric,
            validation_loss=validation.loss,
            validation_metric=validation.metric,
            lr=lr,
            steps=steps,
            gradient_evaluations=self._gradients_before + self.closures.total(),
            seconds=self._seconds_before + (time.perf_counter() - self._started) / self.members,
        )
        return TrackedRecord(**vars(record), **tracked) if tracked else record

    def track(self, step: int) -> None:
        """Measure within an epoch, after this step of the optimizer, where that is asked for."""
        every = self.config.track_every
        if every and step % every == 0:
            lr = self.optimizer.param_groups[0]["lr"]
            self._between.append({"step": step, "lr": lr, **(self._measured() or {})})

    def _measured(self) -> dict[str, Any] | None:
        """What is tracked, at the present weights, measured by the first process for all."""
        return distributed.broadcast(self.tracker.measure) if self.tracker else None

    def _scores(self, data: Any) -> Scores:
        """The scores of the model, computed by the first process for all."""
        return distributed.broadcast(lambda: self.task.evaluate(self.model, data))

    def best_yet(self, record: EpochRecord) -> bool:
        """Whether a record is better on validation than all that are kept."""
        rank = self.task.rank
        ranks = [rank(each.validation_metric, each.validation_loss) for each in self.records]
        return not ranks or rank(record.validation_metric, record.validation_loss) > max(ranks)

    def keep(self, record: EpochRecord) -> None:
        """Take in the record of an epoch; write a checkpoint where the last one is old, and at the end."""
        best = self.best_yet(record)
        self.records.append(record)
        if best:
            weights = deepcopy(self.model.state_dict())  # the test data are seen at the end of training
            self.best = {"epoch": record.epoch, "validation_metric": record.validation_metric, "model": weights}
        ends = record.epoch == self.config.epochs or self._stalled(record.epoch + 1)
        if self.first and (ends or time.perf_counter() - self._saved > SAVE_EVERY):
            save_checkpoint(self.out / CHECKPOINT, self.state_dict())
            write_lines(self.out / RECORDS, [record.line() for record in self.records])
            self._saved = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """All that a stopped run goes on from."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **({"scaler": self.scaler.state_dict()} if self.scaler else {}),
            "order": self.order.get_state(),
            "records": [record.line() for record in self.records],
            "best": self.best,
            **({"tracker": self.tracker.state_dict()} if self.tracker else {}),
        }

    def load_state_dict(self, state: dict[str, Any], path: Path) -> None:
        """Go on from a state of `state_dict`, read from this path. Raises UsageError where it is of another run."""
        kind = TrackedRecord if self.tracker else EpochRecord
        try:
            check_types(self.model, state["model"], path)
            self.model.load_state_dict(state["model"])
            groups = self.optimizer.param_groups
            options = [{name: value for name, value in group.items() if name != "params"} for group in groups]
            _check_kept(state["optimizer"], self.optimizer)
            self.optimizer.load_state_dict(state["optimizer"])
            for group, own in zip(self.optimizer.param_groups, options, strict=True):
                group.update(own)  # which the config decides
            if self.scaler:
                self.scaler.load_state_dict(state["scaler"])
            self.order.set_state(state["order"])
            if self.tracker:
                self.tracker.load_state_dict(state["tracker"])
            best = dict(state["best"])
            check_types(self.model, best["model"], path)
            deepcopy(self.model).load_state_dict(best["model"])
            self.records, self.best = [kind(**record) for record in state["records"]], best
        except Exception as error:  # damage shows as many kinds of error
            raise UsageError(f"{path} is not a checkpoint of this run; delete it to start afresh") from error

    def finish(self) -> None:
        """Write the weights that the run ends with, and its result."""
        if not self.first:
            return
        best = deepcopy(self.model)
        best.load_state_dict(self.best.pop("model"))
        end, test = self.records[self.best["epoch"] - 1], self.task.evaluate(best, self.data.test)
        self.best["test_metric"] = test.metric
        if self.config.patience:
            self.model = best
        elif end is not self.records[-1]:
            end, test = self.records[-1], self.task.evaluate(self.model, self.data.test)
        save_model_weights(self.out / WEIGHTS, self.model)
        write_json(self.out / RESULT, self._result(end, test))

    def _interpolates(self, end: EpochRecord) -> bool:
        """Whether the training samples are fitted: every label right, and hardly a loss."""
        fitted = not self.task.classes or end.train_metric == 1
        return self.task.fixed_samples and end.train_loss < 1e-3 and fitted

    def _result(self, end: EpochRecord, test: Scores) -> dict[str, Any]:
        """The result of a run whose weights are those of this record: the last one, or the best one with patience."""
        return {
            "metric": self.task.metric,
            "final": {
                "train_loss": end.train_loss,
                "train_metric": end.train_metric,
                "validation_loss": end.validation_loss,
                "validation_metric": end.validation_metric,
                "test_loss": test.loss,
                "test_metric": test.metric,
                **{f"test_{name}": value for name, value in test.others.items()},
            },
            "best": self.best,  # the epoch is selected on validation
            "interpolates": self._interpolates(end),
            "parameters": parameter_count(self.model),
            **(
                {"dense_parameters": parameter_count(network.dense(self.task, self.config, self.data))}
                if self.config.sparsity
                else {}
            ),
            **({"label_noise": _noise(self.config, self.data)} if self.config.label_noise else {}),
            "epochs": self.records[-1].epoch,
            "gradient_evaluations": self.records[-1].gradient_evaluations,
            "seconds": self.records[-1].seconds,
        }


def _stopped(path: Path) -> dict[str, Any]:
    """The state of a run that was stopped. Raises UsageError where it is not one that training has saved."""
    state = load_checkpoint(path)
    weights, numbers = state.get("model"), state.get("best")
    try:
        if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
            raise UsageError("it holds no weights by name")
        check_records(state.get("records"), *(field.name for field in fields(EpochRecord)))
        check(numbers, {"epoch": COUNT, "validation_metric": NUMBER}, ("epoch", "validation_metric", "model"))
    except UsageError as error:
        raise UsageError(f"{path} is not a checkpoint of a run ({error}); delete it to start afresh") from None
    return state


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


def _held_out(data: Any, batch_size: int, order: torch.Generator) -> Callable[[], Batch]:
    """Gives batches of these samples, drawn with replacement."""

    def draw() -> Batch:
        chosen = torch.randint(len(data), (min(batch_size, len(data)),), generator=order)
        batch: Batch = next(data[chosen.to(data.targets.device)].batches(batch_size))
        return batch

    return draw


def _tracker(model: nn.Module, task: Task, data: Any, config: Config, optimizer: torch.optim.Optimizer) -> Tracker:
    parameters = parameter_count(model)
    if config.track > parameters:
        raise UsageError(f"track must be <= the number of parameters, {parameters}, got {config.track}")
    samples, _ = task.subsample(model, data, SAMPLES, config.seed)
    hessian, names = Hessian(model, task.loss, samples), config.tracked_measures()
    return Tracker(hessian, config.track, names, optimizer, batch_size=config.batch_size)


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


def _noise(config: Config, data: Splits) -> dict[str, Any]:
    """What was done to the training labels, which the run's folder holds."""
    changed = round(config.label_noise * int((data.train.targets >= 0).sum()))
    return {"rate": config.label_noise, "seed": config.seed, "changed": changed}
