"""The folder of a run: the names and contents of its files, whether it is this run's, and a finished run."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from samlite.data.noise import noisy
from samlite.documents import AMOUNT, COUNT, GAPPED, MAYBE, NUMBER, POSITIVE, SWITCH, TEXT, Shape, check
from samlite.errors import UsageError
from samlite.files import parse_json, read_json, regular
from samlite.tasks import Splits, Task
from samlite.training import network
from samlite.training.checkpoints import load_model_weights, load_weights, save_tensors
from samlite.training.config import Config, task_of, usable_device
from samlite.training.sparsity import masks_in
from samlite.training.weights import FOLDER_FILES

# The files of a run
CONFIG = "config.json"  # all that repeats it
RECORDS = "metrics.jsonl"  # a line an epoch
CHECKPOINT = "checkpoint.pt"  # what a stopped run goes on from
WEIGHTS = "model.safetensors"  # those it ends with
RESULT = "result.json"  # of a finished run
LABELS = "labels.safetensors"  # that are trained on, where there is label noise
SHARPNESS = "sharpness.json"  # what was measured; `samlite.training.measurements` reads and writes it
TRACK = "track.png"  # the figure of its eigenvalues along training

_RESULT: Shape = {
    "metric": TEXT,
    "final": {"*": NUMBER},
    "best": {"epoch": COUNT, "*": NUMBER},
    "interpolates": SWITCH,
    "parameters": COUNT,
    "epochs": COUNT,
    "gradient_evaluations": AMOUNT,
    "seconds": POSITIVE,
}
_RECORD: Shape = {
    "epoch": COUNT,
    "train_loss": NUMBER,
    "train_metric": NUMBER,
    "validation_loss": NUMBER,
    "validation_metric": NUMBER,
    "lr": POSITIVE,
    "steps": AMOUNT,
    "gradient_evaluations": AMOUNT,
    "seconds": POSITIVE,
    "eigenvalues": GAPPED,
    "products": AMOUNT,
    "measures": {"*": MAYBE},
    "errors": {"*": POSITIVE},
}
_WITHIN: Shape = {"step": COUNT, "lr": POSITIVE, "eigenvalues": GAPPED, "products": AMOUNT, "measures": {"*": MAYBE}}


@dataclass(frozen=True)
class Run:
    """A finished run: its final weights in evaluation mode, on the same device as its data."""

    folder: Path
    config: Config
    task: Task
    model: nn.Module
    data: Splits


def is_run(path: Path) -> bool:
    """Whether a path is the folder of a run, finished or not, and not one of Hugging Face's with weights."""
    if not path.is_dir():
        return False
    try:
        keys = read_json(path / CONFIG).keys()
    except FileNotFoundError:
        return not any((path / name).exists() for name in FOLDER_FILES)
    except UsageError:  # which is told when the run is read
        return True
    return not keys & {"architectures", "architecture", "model_type"}


def read_config(folder: Path) -> Config:
    """Read what a run was told. Raises UsageError."""
    return Config.from_json(read_json(folder / CONFIG), folder / CONFIG)


def read_result(folder: Path, *needed: str) -> dict[str, Any]:
    """Read the result of a run, with these fields in it; "final.test_metric" is within "final". Raises UsageError."""
    result = read_json(folder / RESULT)
    try:
        return check(result, _RESULT, needed)
    except UsageError as error:
        raise UsageError(
            f"{folder} has a {RESULT} that no run wrote ({error}); delete it and repeat the command of the run"
        ) from None


def read_records(folder: Path, *needed: str) -> list[dict[str, Any]]:
    """Read the records of a run, one an epoch, with these fields in each. Raises UsageError where there are none."""
    path = folder / RECORDS
    try:
        lines = regular(path).read_text(encoding="utf-8-sig").splitlines()
        return check_records([parse_json(line) for line in lines], *needed)
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(f"{path} must hold the records of a run, a line an epoch ({error})") from None


def check_records(records: Any, *needed: str) -> list[dict[str, Any]]:
    """The records of a run's epochs, unless something is wrong with them, which ValueError says."""
    if not isinstance(records, list) or not records:
        raise UsageError("there must be one at least")
    for epoch, record in enumerate(records, 1):
        try:
            check(record, _RECORD, needed)
            within = record.get("between", [])
            if not isinstance(within, list):
                raise UsageError("between must be a list")
            for part in within:
                check(part, _WITHIN, ["step", "lr", "eigenvalues"])
        except UsageError as error:
            raise UsageError(f"of epoch {epoch}: {error}") from None
        if record.get("epoch", epoch) != epoch:
            raise UsageError(f"of epoch {epoch}: epoch must count up from 1, got {record['epoch']}")
    for name in ("steps", "gradient_evaluations"):
        counts = [record[name] for record in records if name in record]
        if any(after <= before for before, after in zip(counts, counts[1:], strict=False)):
            raise UsageError(f"{name} must grow from epoch to epoch")
    if len({len(record.get("eigenvalues", ())) for record in records}) > 1:
        raise UsageError("eigenvalues must be as many in every epoch")
    return records


def load_run(folder: Path | str, device: str | None = None) -> Run:
    """A finished run with its data. Raises UsageError where the folder holds none."""
    folder = Path(folder)
    if not (folder / RESULT).is_file():
        raise UsageError(f"{folder} must be the folder of a finished run; it has no {RESULT}")
    config = read_config(folder)
    task, place = task_of(config), usable_device(device or config.device)
    data = load_data(task, config, folder).to(place)
    return Run(folder, config, task, final_network(task, config, data, folder), data)


def final_network(task: Task, config: Config, data: Splits, folder: Path) -> nn.Module:
    """The trained network in evaluation mode, beside its data."""
    path = folder / WEIGHTS
    masks: Mapping[str, Tensor] = masks_in(load_weights(path)) if config.sparsity else {}
    try:
        model = network.initial(task, config, data, masks)
    except UsageError as error:
        raise UsageError(f"{path} does not hold the weights of this run's network: {error}") from None
    load_model_weights(path, model)
    return model.eval()


def load_data(task: Task, config: Config, folder: Path) -> Splits:
    """The data on the CPU, the training labels with their noise, which stays what the folder says once it does."""
    data = task.splits(config.data, config.seed)
    if config.train_samples:
        data = replace(data, train=task.draw(data.train, config.train_samples, config.seed))
    if not config.label_noise:
        return data
    if (folder / LABELS).exists():
        labels = load_weights(folder / LABELS).get("labels")
        if labels is None or not _are_labels(labels, data.train.targets, task.classes_in(data) or 0):
            raise UsageError(f"{folder / LABELS} does not hold the labels of this run's data; delete it")
    else:
        classes = task.classes_in(data)
        assert classes is not None  # the config was checked
        labels = noisy(data.train.targets, classes, config.label_noise, config.seed)
    return replace(data, train=replace(data.train, targets=labels))


def _are_labels(labels: Tensor, targets: Tensor, classes: int) -> bool:
    """Whether these are class numbers wherever the targets are."""
    if labels.shape != targets.shape or labels.dtype != targets.dtype:
        return False
    known = targets >= 0
    chosen = labels[known]
    return torch.equal(labels >= 0, known) and bool(((chosen < classes) & (chosen == chosen.floor())).all())


def save_labels(data: Splits, folder: Path) -> None:
    """Keep the labels that are trained on."""
    save_tensors(folder / LABELS, {"labels": data.train.targets.cpu()})


def check_folder(out: Path, config: Config, resume: bool) -> None:
    """Raise UsageError unless the folder is empty or, to resume, holds this very run."""
    if not out.exists() or all(path.name.startswith(".") for path in out.iterdir()):
        return
    if not resume:
        raise UsageError(f"{out} must be empty without resuming; choose another folder or delete this one")
    if not (out / CONFIG).exists():
        raise UsageError(f"{out} must be empty or hold a run, but it has no {CONFIG}; choose another folder")
    there = read_config(out)
    differences = [
        f"{name} {value} there, {getattr(config, name)} now"
        for name, value in vars(there).items()
        if value != getattr(config, name)
    ]
    if differences:
        raise UsageError(f"{out} holds another run ({'; '.join(differences)}); choose another folder")
