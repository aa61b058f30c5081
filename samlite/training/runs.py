"""The folder of a run: whether it is this run's, the labels it trains on, and the run when it is finished."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from samlite.data.noise import noisy
from samlite.errors import UsageError
from samlite.tasks import Splits, Task
from samlite.training import network
from samlite.training.checkpoints import load_model_weights, load_weights, save_tensors
from samlite.training.config import Config, task_of, usable_device
from samlite.training.documents import CONFIG, RESULT, read_config
from samlite.training.sparsity import masks_in

CHECKPOINT, WEIGHTS = "checkpoint.pt", "model.safetensors"
LABELS = "labels.safetensors"  # of a run with label noise


@dataclass(frozen=True)
class Run:
    """A finished run: its final weights in evaluation mode, on the same device as its data."""

    folder: Path
    config: Config
    task: Task
    model: nn.Module
    data: Splits


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
    found = read_config(out)
    differences = [
        f"{name} {value} there, {getattr(config, name)} now"
        for name, value in vars(found).items()
        if value != getattr(config, name)
    ]
    if differences:
        raise UsageError(f"{out} holds another run ({'; '.join(differences)}); choose another folder")
