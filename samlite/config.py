"""The resolved recipe of a run: everything that decides its result."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from samlite import tasks

BASES = ("sgd", "adam", "adamw")
OPTIMIZERS = (*BASES, "sam")
SCHEDULES = ("step", "cosine", "constant")


@dataclass(frozen=True)
class Config:
    """One run, every field resolved. `Config.of` fills in a task's recipe."""

    task: str
    width: int
    optimizer: str
    base: str  # the optimizer that SAM wraps; the optimizer itself where that is not SAM
    rho: float
    lr: float
    momentum: float
    weight_decay: float
    batch_size: int
    epochs: int
    schedule: str
    milestones: tuple[float, ...]  # fractions of the epochs at which the step schedule divides lr by 10
    threads: int  # of the CPU; the last bits of a result depend on it
    seed: int
    data: str | None
    device: str
    track: int = 0  # largest Hessian eigenvalues recorded after every epoch

    def __post_init__(self) -> None:
        task = tasks.get(self.task)
        _check_integer("width", self.width, 1)
        _check_choice("optimizer", self.optimizer, OPTIMIZERS)
        _check_choice("base", self.base, BASES)
        _check_number("rho", self.rho)
        _check_number("lr", self.lr, above=True)
        _check_number("momentum", self.momentum, below=1)
        _check_number("weight_decay", self.weight_decay)
        _check_integer("batch_size", self.batch_size, 1)
        _check_integer("epochs", self.epochs, 1)
        _check_choice("schedule", self.schedule, SCHEDULES)
        if not isinstance(self.milestones, tuple):
            raise ValueError(f"milestones must be a list of numbers, got {self.milestones!r}")
        for milestone in self.milestones:
            _check_number("milestones", milestone, above=True, below=1)
        _check_integer("threads", self.threads, 1)
        _check_integer("seed", self.seed, 0)
        _check_device(self.device)
        _check_integer("track", self.track, 0)
        if self.optimizer != "sam" and self.rho:
            raise ValueError(f"rho must be 0 without SAM, got {self.rho}; use optimizer sam")
        if self.optimizer != "sam" and self.base != self.optimizer:
            raise ValueError(f"base must go with optimizer sam, got {self.base} with {self.optimizer}")
        if self.base != "sgd" and self.momentum:
            raise ValueError(f"momentum must be 0 for {self.base}, got {self.momentum}; it belongs to sgd")
        if self.schedule != "step" and self.milestones:
            raise ValueError(f"milestones must go with the step schedule, got {self.schedule}")
        if not isinstance(self.data, str | None):
            raise ValueError(f"data must be a hub id or a path, got {self.data!r}")
        if (self.data is None) != (task.source is None):
            needs = "not be given: the task brings its own" if task.source is None else "name a source"
            raise ValueError(f"data of task {task.name} must {needs}, got {self.data}")

    @classmethod
    def of(cls, task: str, recipe: Mapping[str, Any] | None = None, **choices: Any) -> "Config":
        """The recipe of a task with its overrides.

        Args:
            recipe: replaces fields of the task's recipe, each used where it applies.
            choices: fields of this run; None is no choice. One that does not apply is an error.
        """
        known = tasks.get(task)
        recipe = dict(recipe or {})
        check_recipe(recipe)
        chosen = {name: value for name, value in choices.items() if value is not None}
        optimizer = chosen.setdefault("optimizer", "sgd")
        base = chosen.setdefault("base", "sgd" if optimizer == "sam" else optimizer)
        _check_choice("optimizer", optimizer, OPTIMIZERS)
        _check_choice("base", base, BASES)
        values = {
            "width": known.width,
            "seed": 0,
            "data": known.source,
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            **asdict(known.recipe),
            "lr": known.recipe.lr[base],
            **recipe,
        }
        if optimizer != "sam":
            values["rho"] = 0.0
        if base != "sgd":
            values["momentum"] = 0.0
        if {**values, **chosen}["schedule"] != "step":
            values["milestones"] = ()
        values |= chosen
        if isinstance(values["milestones"], list):
            values["milestones"] = tuple(values["milestones"])
        if isinstance(values["data"], (str, Path)) and Path(values["data"]).is_dir():
            values["data"] = str(Path(values["data"]).resolve())  # found again from anywhere
        return cls(task=task, **values)

    @classmethod
    def from_json(cls, document: Mapping[str, Any], origin: object) -> "Config":
        """The config in a JSON object, which may hold more. Raises ValueError naming its origin."""
        try:
            document = {"track": 0, **document}
            values = {field.name: document[field.name] for field in fields(cls)}
            return cls(**{**values, "milestones": tuple(values["milestones"])})
        except KeyError as error:
            raise ValueError(f"{origin} must hold the field {error}") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{origin} does not describe a run: {error}") from None

    def to_json(self) -> dict[str, Any]:
        """Every field but a `track` of 0, as written before there was one."""
        document = {**asdict(self), "milestones": list(self.milestones)}
        return document if self.track else {name: value for name, value in document.items() if name != "track"}

    @property
    def name(self) -> str:
        """A folder name that tells apart the cells of a sweep: optimizer, rho, width, seed."""
        optimizer = self.optimizer
        if optimizer == "sam":
            optimizer = f"sam-rho{self.rho}" if self.base == "sgd" else f"sam-{self.base}-rho{self.rho}"
        return f"{optimizer}-w{self.width}-s{self.seed}"


def check_recipe(recipe: Mapping[str, Any]) -> None:
    """Raise ValueError unless every name is a field of a recipe."""
    names = [field.name for field in fields(tasks.Recipe)]
    for name in recipe:
        if name not in names:
            near = get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"a recipe holds {', '.join(names)}, got {name!r}{hint}")


def usable_device(name: str) -> torch.device:
    """The device of this name. Raises ValueError where this machine cannot compute on it."""
    device = _check_device(name)
    try:
        torch.zeros(1, device=device).item()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"device must be usable here, got {name!r} ({reason}); use cpu") from None
    return device


def _check_device(name: str) -> torch.device:
    try:
        return torch.device(str(name))
    except (RuntimeError, TypeError):
        raise ValueError(f"device must be a name such as cpu or cuda:0, got {name!r}") from None


def _check_integer(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if not least <= value < 2**63:
        raise ValueError(f"{name} must be >= {least}{' and below 2^63' * (value > 0)}, got {value}")


def _check_number(name: str, value: object, *, above: bool = False, below: float = math.inf) -> None:
    """A finite number >= 0, or > 0 with `above`, and < below."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if not (0 <= value < below) or (above and value == 0):
        limit = "" if below == math.inf else f" and < {below}"
        raise ValueError(f"{name} must be {'>' if above else '>='} 0{limit}, got {value}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
