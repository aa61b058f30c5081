"""The sharpness of a run's minimum: its measurement, and the ``sharpness.json`` that keeps it."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from samlite import distributed
from samlite.curvature.hessian import Hessian
from samlite.curvature.matrix import Progress
from samlite.curvature.results import Eigenvalues
from samlite.documents import ANSWER, BY_ORDER, GAPPED, NUMBERS, POSITIVE, SWITCH, TEXT, Shape, check
from samlite.errors import UsageError
from samlite.files import locked, read_json, write_json
from samlite.training.checkpoints import load_checkpoint
from samlite.training.optimizer import optimizer_of
from samlite.training.runs import CHECKPOINT, SHARPNESS, Run, load_run

SAMPLES = 8192  # measured by default, as sharpness changes little beyond them

MEASURES = ("eigenvalues", "moments")  # what may be measured of a minimum; moments are never kept without eigenvalues
_MEASUREMENT: dict[str, Shape] = {
    "eigenvalues": {"which": TEXT, "values": NUMBERS, "errors": GAPPED, "converged": SWITCH, "complete": ANSWER},
    "moments": {"unit": TEXT, "converged": SWITCH, "nonuniformity": BY_ORDER},
}
_SHARPNESS: Shape = {**_MEASUREMENT, "ggn": _MEASUREMENT}
_NEEDED = {"eigenvalues": ("which", "values", "converged", "complete"), "moments": ("unit", "converged")}


@dataclass(frozen=True)
class Subject:
    """A model at its minimum, with the loss and the data that its sharpness is measured on."""

    model: nn.Module
    loss: Any
    data: Any
    samples: int | None  # measured; None where the data do not say
    available: int | None  # in the data
    lr: float | None = None  # that the run was trained with
    rho: float = 0.0
    batch_size: int = 128
    classes: bool = False  # whether targets are labels of classes
    optimizer: torch.optim.Optimizer | None = None  # of the run, as its last step left it

    def hessian(self, dtype: str = "float32", **options: Any) -> Hessian:
        """The Hessian in this type; the data follow the model, and are shared out over the processes there are."""
        group = dist.group.WORLD if distributed.world() > 1 else None
        model = self.model.to(getattr(torch, dtype))
        return Hessian(model, self.loss, distributed.own_part(self.data), process_group=group, **options)


def run_subject(folder: Path, samples: int | None = None, device: str | None = None) -> Subject:
    """A finished run with its training samples: all of them up to 8,192, or so many drawn by the run's seed."""
    run = load_run(folder, device)
    count = SAMPLES if samples is None else samples
    data, measured = run.task.subsample(run.model, run.data.train, count, run.config.seed)
    available, config = max(measured, len(run.data.train)), run.config
    return Subject(
        *(run.model, run.task.loss, data, measured, available, config.lr, config.rho, config.batch_size),
        classes=bool(run.task.classes),
        optimizer=_optimizer(run),
    )


def _optimizer(run: Run) -> torch.optim.Optimizer | None:
    """The optimizer of a run after its last step; None where its weights are those of an earlier epoch, or it is gone.

    The learning rate is that of the last step.
    """
    path = run.folder / CHECKPOINT
    if not path.is_file():
        return None
    state, weights = load_checkpoint(path), run.model.state_dict()
    try:
        kept = {name: tensor.to(weights[name].device) for name, tensor in state["model"].items()}
        if not all(torch.equal(kept[name], weight) for name, weight in weights.items()):
            return None
        optimizer = optimizer_of(run.model, run.config, None)
        optimizer.load_state_dict(state["optimizer"])
    except Exception as error:  # damage shows as many kinds of error
        raise UsageError(f"{path} is not a checkpoint of this run; delete it to measure without") from error
    for group in optimizer.param_groups:
        group["rho"] = run.config.rho  # also where the last step was a plain one
    return optimizer


def drawn(pair: tuple[Tensor, Tensor], count: int, seed: int) -> tuple[Tensor, Tensor]:
    """So many rows of the pair, drawn by the seed and kept in order; the pair itself where it has no more."""
    inputs, targets = pair
    if count >= len(inputs):
        return pair
    rows = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))[:count].sort().values
    return inputs[rows.to(inputs.device)], targets[rows.to(targets.device)]


def read_sharpness(folder: Path) -> dict[str, Any]:
    """Read what was measured of a run; empty where nothing was. Raises UsageError."""
    path = folder / SHARPNESS
    if not path.exists():
        return {}
    record = read_json(path)
    try:
        check(record, _SHARPNESS)
        for measured in (record, record.get("ggn", {})):
            for name, fields in _NEEDED.items():
                check(measured, {}, [f"{name}.{field}" for field in fields if name in measured])
            if measured.get("moments", {}).get("converged"):
                check(measured["moments"], {"nonuniformity": {"*": POSITIVE}}, ["nonuniformity"])
        return record
    except UsageError as error:
        raise UsageError(f"{path} is not a measurement ({error}); delete it and measure again") from None


def is_measured(folder: Path, measure: Collection[str]) -> bool:
    """Whether a run holds converged measurements of all these; moments count only beside eigenvalues."""
    if not measure:
        return True
    return sharpness(folder) is not None and ("moments" not in measure or nonuniformity(folder) is not None)


def sharpness(folder: Path) -> float | None:
    """The largest Hessian eigenvalue of a run; None where it was not measured or cannot be trusted."""
    eigenvalues = read_sharpness(folder).get("eigenvalues")
    if eigenvalues is None:
        return None
    trusted = eigenvalues["which"] == "LA" and eigenvalues["converged"] and eigenvalues["complete"] is not False
    return float(eigenvalues["values"][0]) if trusted else None


def nonuniformity(folder: Path) -> dict[int, float] | None:
    """The s_k of a run's moments by their order k; None where they were not measured or did not converge."""
    moments = read_sharpness(folder).get("moments")
    if moments is None or moments["unit"] != "sample" or not moments["converged"]:
        return None
    return {int(k): float(s) for k, s in moments["nonuniformity"].items()}


def measure_run(folder: Path, moments: bool = False, progress: Progress | None = None) -> None:
    """Measure what a finished run lacks of its largest eigenvalue and, if asked, its moments.

    Both are kept in its ``sharpness.json``, converged or not.
    """
    subject = run_subject(folder)
    record: dict[str, Any] = {}
    if not is_measured(folder, ["eigenvalues"]):
        record = as_record(subject, subject.hessian().eigenvalues(1, verify=True, progress=progress))
    if moments and not is_measured(folder, ["moments"]):
        # A sample that is fitted well has an output gradient of rounding errors in float32, and so have its powers.
        dtype = "float32" if any(p.device.type == "mps" for p in subject.model.parameters()) else "float64"
        result = subject.hessian(dtype).moments(progress=progress)
        record["moments"] = {**document(result), "dtype": dtype}
    keep(folder, record)


def keep(folder: Path, record: dict[str, Any]) -> None:
    """Put a measurement into a run's ``sharpness.json``, beside earlier ones: the weights of a finished run stay.

    What did not converge replaces nothing that did; then what was said of the earlier eigenvalues stays, too. The
    Gauss-Newton matrix has a place of its own. Several processes may do so at once.
    """
    with locked(folder):
        whole = read_sharpness(folder)
        kept = whole.setdefault("ggn", {}) if record.get("curvature") == "ggn" else whole
        worse = [name for name, value in record.items() if _converged(value) is False and _converged(kept.get(name))]
        if "eigenvalues" in worse:  # which the settings beside them describe
            worse += [name for name, value in record.items() if not isinstance(value, dict)]
        kept.update({name: value for name, value in record.items() if name not in worse})
        write_json(folder / SHARPNESS, whole)


def _converged(value: Any) -> Any:
    return value.get("converged") if isinstance(value, dict) else None


def as_record(subject: Subject, eigenvalues: Eigenvalues, which: str = "LA", **settings: Any) -> dict[str, Any]:
    """A measurement as JSON: what was measured, the values, and how far they can be trusted."""
    return {
        "samples": subject.samples,
        "available": subject.available,
        "parameters": sum(p.numel() for p in subject.model.parameters()),
        "mode": "eval",
        "dtype": "float32",
        **settings,
        "eigenvalues": {
            "which": which,
            "values": eigenvalues.values.tolist(),
            "errors": document(eigenvalues.errors),
            "residuals": document(eigenvalues.residuals),
            "converged": eigenvalues.converged,
            "complete": eigenvalues.complete,
            "matvecs": eigenvalues.matvecs,
        },
        "seconds": eigenvalues.seconds,
    }


def document(result: Any) -> Any:
    """A result as JSON: its fields without times, tensors as lists, and None for what is not a number."""
    if isinstance(result, dict):
        return {str(key): document(value) for key, value in result.items()}
    if is_dataclass(result) and not isinstance(result, type):
        names = [field.name for field in fields(result) if field.name not in ("seconds", "gradient_evaluations")]
        return {name: document(getattr(result, name)) for name in names}
    if isinstance(result, Tensor):
        return document(result.tolist())
    if isinstance(result, list | tuple):
        return [document(value) for value in result]
    return None if isinstance(result, float) and not math.isfinite(result) else result
