"""Measuring the sharpness of a minimum: of a finished run, or of anyone's checkpoint.

A subject is what `Hessian` needs, from either source. A run's own measurement is written to its ``sharpness.json``.
Nothing in a checkpoint is executed: weights are read as tensors only.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, is_dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from samlite import distributed
from samlite.batches import is_pair
from samlite.curvature.hessian import Hessian
from samlite.curvature.matrix import Progress
from samlite.curvature.results import Eigenvalues
from samlite.curvature.stream import checked_data
from samlite.documents import ANSWER, BY_ORDER, GAPPED, NUMBERS, POSITIVE, SWITCH, TEXT, Shape, check
from samlite.errors import UsageError
from samlite.files import locked, read_json, write_json
from samlite.training.checkpoints import check_types, load_weights
from samlite.training.config import usable_device
from samlite.training.runs import SHARPNESS, load_run

SAMPLES = 8192  # measured by default, as sharpness changes little beyond them

MEASURES = ("eigenvalues", "moments")  # what may be measured of a minimum; moments are never kept without eigenvalues
_LOSSES: dict[str, Callable[[], nn.Module]] = {"cross_entropy": nn.CrossEntropyLoss, "mse": nn.MSELoss}
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

    def hessian(self, dtype: str = "float32", **options: Any) -> Hessian:
        """The Hessian in this type; the data follow the model, and are shared out over the processes there are."""
        group = dist.group.WORLD if distributed.world() > 1 else None
        model = self.model.to(getattr(torch, dtype))
        return Hessian(model, self.loss, distributed.own_part(self.data), process_group=group, **options)


def run_subject(folder: Path, samples: int | None = None, device: str | None = None) -> Subject:
    """A finished run with its training samples: all of them up to 8,192, or so many drawn by the run's seed."""
    run = load_run(folder, device)
    count = SAMPLES if samples is None else samples
    data, measured = run.task.measured(run.model, run.data.train, count, run.config.seed)
    return Subject(
        run.model, run.task.loss, data, measured, max(measured, len(run.data.train)), run.config.lr, run.config.rho
    )


def checkpoint_subject(
    path: Path,
    model: str,
    data: str,
    loss: str = "cross_entropy",
    samples: int | None = None,
    device: str | None = None,
) -> Subject:
    """Weights in a .pt, .pth or .safetensors file, in the module that ``pkg.mod:factory`` builds.

    Args:
        model: names a module, or a function without arguments that returns one.
        data: names an (inputs, targets) pair, a re-iterable of batches, or a function that returns one.
        loss: ``cross_entropy``, ``mse``, or names a loss module or a function of (model, batch).
        samples: so many rows of the pair, drawn at random but always the same.
    """
    module = _made(model, "--model")
    if not isinstance(module, nn.Module):
        raise UsageError(f"--model must name a torch.nn.Module or a function that returns one, got {model!r}")
    _load_into(module, load_weights(path), path)
    module.to(usable_device(device or "cpu"))
    criterion = _LOSSES[loss]() if loss in _LOSSES else resolve(loss, "--loss")
    batches = checked_data(_made(data, "--data"))
    if not is_pair(batches):
        if samples is not None:
            raise UsageError("--samples needs --data to name a pair of tensors; limit the batches themselves")
        return Subject(module, criterion, batches, None, None)
    available = len(batches[0])
    pair = batches if samples is None else drawn(batches, samples, seed=0)
    return Subject(module, criterion, pair, len(pair[0]), available)


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
    found = read_json(path)
    try:
        check(found, _SHARPNESS)
        for measured in (found, found.get("ggn", {})):
            for name, fields in _NEEDED.items():
                check(measured, {}, [f"{name}.{field}" for field in fields if name in measured])
            if measured.get("moments", {}).get("converged"):
                check(measured["moments"], {"nonuniformity": {"*": POSITIVE}}, ["nonuniformity"])
        return found
    except UsageError as error:
        raise UsageError(f"{path} is not a measurement ({error}); delete it and measure again") from None


def measured(folder: Path, measure: Collection[str]) -> bool:
    """Whether a run holds converged measurements of all these; moments count only beside eigenvalues."""
    if not measure:
        return True
    return sharpness(folder) is not None and ("moments" not in measure or nonuniformity(folder) is not None)


def sharpness(folder: Path) -> float | None:
    """The largest Hessian eigenvalue of a run; None where it was not measured or cannot be trusted."""
    found = read_sharpness(folder).get("eigenvalues")
    if found is None:
        return None
    trusted = found["which"] == "LA" and found["converged"] and found["complete"] is not False
    return float(found["values"][0]) if trusted else None


def nonuniformity(folder: Path) -> dict[int, float] | None:
    """The s_k of a run's moments by their order k; None where they were not measured or did not converge."""
    found = read_sharpness(folder).get("moments")
    if found is None or found["unit"] != "sample" or not found["converged"]:
        return None
    return {int(k): float(s) for k, s in found["nonuniformity"].items()}


def measure_run(folder: Path, moments: bool = False, progress: Progress | None = None) -> None:
    """Measure what a finished run lacks of its largest eigenvalue and, if asked, its moments.

    Both are kept in its ``sharpness.json``, converged or not.
    """
    subject = run_subject(folder)
    record: dict[str, Any] = {}
    if not measured(folder, ["eigenvalues"]):
        record = as_record(subject, subject.hessian().eigenvalues(1, verify=True, progress=progress))
    if moments and not measured(folder, ["moments"]):
        # A sample that is fitted well has an output gradient of rounding errors in float32, and so have its powers.
        dtype = "float32" if any(p.device.type == "mps" for p in subject.model.parameters()) else "float64"
        found = subject.hessian(dtype).moments(progress=progress)
        record["moments"] = {**document(found), "dtype": dtype}
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


def as_record(subject: Subject, found: Eigenvalues, which: str = "LA", **settings: Any) -> dict[str, Any]:
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
            "values": found.values.tolist(),
            "errors": document(found.errors),
            "residuals": document(found.residuals),
            "converged": found.converged,
            "complete": found.complete,
            "matvecs": found.matvecs,
        },
        "seconds": found.seconds,
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


def resolve(name: str, option: str) -> Any:
    """The object that ``pkg.mod:name`` names; the current folder is on the path."""
    module_name, separator, attribute = name.partition(":")
    if not (separator and module_name and attribute):
        raise UsageError(f"{option} must name an object as pkg.mod:name, got {name!r}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except ImportError as error:
        raise UsageError(f"{option} must name an importable module, got {module_name!r} ({error})") from error
    except AttributeError:
        raise UsageError(f"{option} must name something in {module_name}, got {attribute!r}") from None
    except (Exception, SystemExit) as error:  # the user's own module: whatever goes wrong in it
        raise UsageError(f"{option}: importing {module_name} failed with {type(error).__name__}: {error}") from error
    return found


def _made(name: str, option: str) -> Any:
    """The named object, or what the named function returns."""
    found = resolve(name, option)
    if isinstance(found, nn.Module) or not callable(found):
        return found
    try:
        return found()
    except (Exception, SystemExit) as error:  # the user's own function
        raise UsageError(f"{option}: {name} failed with {type(error).__name__}: {error}") from error


def _load_into(module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    check_types(module, state, path)
    try:
        missing, unexpected = module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        detail = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise UsageError(f"{path} must fit the model of --model: {detail or error}") from None
    except Exception as error:  # quantized layers, and whatever else has its own way to load
        raise UsageError(f"{path} must fit the model of --model, got {type(error).__name__}: {error}") from error
    # A tied weight is stored once: what it is missing under its other names is there.
    tensors = module.state_dict(keep_vars=True)
    present = {id(tensor) for name, tensor in tensors.items() if name in state}
    missing = [name for name in missing if id(tensors[name]) not in present]
    if missing or unexpected:
        raise UsageError(
            f"{path} must fit the model of --model: "
            + "; ".join(
                f"{what} {', '.join(islice(names, 3))}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
                for what, names in (("it lacks", missing), ("the model has no", unexpected))
                if names
            )
        )
