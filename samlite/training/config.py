"""The resolved recipe of a run: everything that decides its result."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from samlite import tasks
from samlite.errors import UsageError
from samlite.files import described

BASES = ("sgd", "adam", "adamw")
FAMILY = ("sam", "friendly", "agnostic", "sampa")
OPTIMIZERS = (*BASES, *FAMILY)
OWN: dict[str, dict[str, float]] = {  # what only some of the family have, with the values that their papers use
    "friendly": {"sigma": 1.0, "lmbda": 0.9},
    "agnostic": {"rho_val": 0.05},
    "sampa": {"lmbda": 0.2},
}
SCALED = ("none", "all", "weights")
OWN_NAMES = ("sigma", "lmbda", "rho_val")
ADAPTIVE = ("sam", "friendly", "sampa")  # where the perturbation may scale with the weights
PERTURBATIONS = ("global", "local")
SPLITS = ("batches", "gradients")
PRECISIONS = ("float32", "bfloat16", "float16")
SCHEDULES = ("step", "cosine", "constant")
CONDITIONS = (  # of training, which a recipe file may set too
    *("augment", "label_noise", "sparsity", "pruner", "patience", "linearize"),
    *("adaptive", "normalize", *OWN_NAMES, "every", "m"),
    *("accumulate", "clip", "precision", "perturb", "split", "sync_batch_norm"),
)
PRUNERS = ("random", "snip", "magnitude")
FLOATS = 2.0**1023  # whatever is smaller can be a float
THREADS = 1024  # at most: a process that cannot start all of its threads is aborted


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
    dropout: float | None = None  # None: the network has none
    settings: tuple[tuple[str, float], ...] = ()  # what only this task has, by name
    augment: bool = False  # the inputs of training batches, as the task does it
    label_noise: float = 0.0  # fraction of the training labels that move to another class
    sparsity: float = 0.0  # fraction of the weights that are masked from the start
    pruner: str | None = None  # that chooses them
    patience: int = 0  # epochs without a better validation result after which training stops; 0: never
    adaptive: str = "none"  # what scales the perturbation (ASAM): "all" parameters, or only the "weights"
    normalize: bool = True  # False: the perturbation is rho times the gradient, however long that is
    every: int = 1  # the perturbation is taken every so many steps, and the base optimizer's own step between
    m: int = 0  # samples that share a perturbation (m-SAM); 0: all of a batch
    sigma: float | None = None  # of friendly: the share of the mean gradient that is left out; None: it has none
    lmbda: float | None = None  # of friendly: the decay of that mean; of sampa: the weight of its second gradient
    rho_val: float | None = None  # of agnostic: the radius on held-out data
    accumulate: int = 1  # micro-batches that a batch is computed in
    clip: float = 0.0  # largest norm of the gradient that is stepped with; 0: any
    precision: str = "float32"  # of the forward pass in training
    perturb: str = "global"  # of several processes: by the gradient of all, or each by its own ("local")
    split: str = "batches"  # what several processes share out; the two "gradients" of sampa
    sync_batch_norm: bool = False  # statistics over all processes, on CUDA devices
    linearize: bool = False  # train the network's first-order expansion about its first weights
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
            raise UsageError(f"milestones must be a list of numbers, got {described(self.milestones)}")
        for milestone in self.milestones:
            _check_number("milestones", milestone, above=True, below=1)
        _check_integer("threads", self.threads, 1, most=THREADS)
        _check_integer("seed", self.seed, 0)
        _check_device(self.device)
        _check_number("label_noise", self.label_noise, below=1)
        _check_number("sparsity", self.sparsity, below=1)
        _check_integer("patience", self.patience, 0)
        _check_integer("track", self.track, 0)
        _check_integer("every", self.every, 1)
        _check_integer("m", self.m, 0)
        _check_integer("accumulate", self.accumulate, 1)
        _check_number("clip", self.clip)
        _check_choice("precision", self.precision, PRECISIONS)
        _check_choice("perturb", self.perturb, PERTURBATIONS)
        _check_choice("split", self.split, SPLITS)
        for name in ("augment", "normalize", "linearize", "sync_batch_norm"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name} must be true or false, got {described(getattr(self, name))}")
        self._check_optimizer()
        self._check_applies(task)

    def _check_optimizer(self) -> None:
        if self.optimizer not in FAMILY:
            if self.rho:
                raise UsageError(f"rho must be 0 without SAM, got {self.rho}; use optimizer sam")
            if self.base != self.optimizer:
                raise UsageError(f"base must go with SAM, got {self.base} with {self.optimizer}; use optimizer sam")
        _check_choice("adaptive", self.adaptive, SCALED)
        if self.adaptive != "none" and self.optimizer not in ADAPTIVE:
            use = " or ".join(ADAPTIVE)
            raise UsageError(f"adaptive must be none for {self.optimizer}, got {self.adaptive}; use optimizer {use}")
        if not self.normalize and self.optimizer not in FAMILY:
            raise UsageError(f"normalize must not be given for {self.optimizer}; use optimizer sam")
        if self.every > 1 and self.optimizer not in ("sam", "friendly"):
            raise UsageError(f"every must be 1 for {self.optimizer}, got {self.every}; use optimizer sam or friendly")
        if self.m and self.optimizer != "sam":
            raise UsageError(f"m must be 0 for {self.optimizer}, got {self.m}; use optimizer sam")
        for name, usual in _own(self.optimizer).items():
            value = getattr(self, name)
            if usual is not None:
                _check_number(name, value)
            elif value is not None:
                owners = " or ".join(optimizer for optimizer in OWN if name in OWN[optimizer])
                raise UsageError(f"{name} must not be given for {self.optimizer}, got {value}; use optimizer {owners}")
        if self.lmbda is not None and (self.lmbda > 1 or (self.lmbda == 1 and self.optimizer == "friendly")):
            raise UsageError(f"lmbda must be {'<' if self.optimizer == 'friendly' else '<='} 1, got {self.lmbda}")
        if self.m and self.accumulate > 1:
            raise UsageError(f"m must be 0 with accumulate {self.accumulate}, got {self.m}; choose one of them")
        if self.perturb == "local" and self.optimizer != "sam":
            raise UsageError(f"perturb must be global for {self.optimizer}, got local; use optimizer sam")
        if self.split == "gradients" and self.optimizer != "sampa":
            raise UsageError(f"split must be batches for {self.optimizer}, got gradients; use optimizer sampa")
        if self.split == "gradients" and self.sync_batch_norm:
            raise UsageError("sync_batch_norm must not go with split gradients: both processes see the whole batch")
        if self.sync_batch_norm and not self.device.startswith("cuda"):
            raise UsageError(f"sync_batch_norm must go with CUDA devices, got {self.device}")
        if self.precision == "float16" and not self.device.startswith("cuda"):
            raise UsageError(f"precision float16 must go with a CUDA device, got {self.device}; use bfloat16")
        if self.base != "sgd" and self.momentum:
            raise UsageError(f"momentum must be 0 for {self.base}, got {self.momentum}; it belongs to sgd")
        if self.schedule != "step" and self.milestones:
            raise UsageError(f"milestones must go with the step schedule, got {self.schedule}")

    def _check_applies(self, task: tasks.Task) -> None:
        """What is asked for must be something that the task has."""
        if not isinstance(self.data, str | None):
            raise UsageError(f"data must be a hub id or a path, got {described(self.data)}")
        if (self.data is None) != (task.source is None):
            needs = "not be given: the task brings its own" if task.source is None else "name a source"
            raise UsageError(f"data of task {task.name} must {needs}, got {self.data}")
        if self.dropout is not None:
            _check_number("dropout", self.dropout, below=1)
            if task.recipe.dropout is None:
                raise UsageError(f"dropout must not be given: the network of task {task.name} has none")
        _check_settings(self.settings, task)
        self._check_samples(task.with_settings(dict(self.settings)))
        if self.augment and not task.augments:
            raise UsageError(f"augment must not be given: task {task.name} has no augmentation")
        if self.label_noise and not task.classes:
            raise UsageError(
                f"label_noise must be 0 for task {task.name}, which has no classes, got {self.label_noise}"
            )
        if self.sparsity:
            _check_choice("pruner", self.pruner, PRUNERS)
        elif self.pruner is not None:
            raise UsageError(f"pruner must go with a sparsity above 0, got {self.pruner}")

    def _check_samples(self, task: tasks.Task) -> None:
        """What needs the same samples all along must go with a task that has them."""
        if task.fixed_samples:
            return
        if self.optimizer == "agnostic":
            raise UsageError(f"optimizer agnostic needs training data to hold out, which task {self.task} has none of")
        if self.optimizer == "sampa":
            raise UsageError(
                f"optimizer sampa needs the next batch before it steps, which task {self.task} plays after"
            )
        if self.track:
            raise UsageError(f"track must be 0 for task {self.task}, whose samples are other ones after every epoch")

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
        optimizer = chosen.setdefault("optimizer", known.base)
        base = chosen.setdefault("base", known.base if optimizer in FAMILY else optimizer)
        _check_choice("optimizer", optimizer, OPTIMIZERS)
        _check_choice("base", base, BASES)
        values = {
            "width": known.width,
            "seed": 0,
            "data": known.source,
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "augment": known.augments,
            **asdict(known.recipe),
            "lr": known.recipe.lr.get(base),
            **recipe,
        }
        if optimizer not in FAMILY:
            values |= {"rho": 0.0, "normalize": True}
        if optimizer not in ADAPTIVE:
            values["adaptive"] = "none"
        if known.recipe.dropout is None:
            values["dropout"] = None
        if not known.augments:
            values["augment"] = False
        if optimizer not in ("sam", "friendly"):
            values["every"] = 1
        if optimizer != "sam":
            values |= {"m": 0, "perturb": "global"}
        for name, usual in _own(optimizer).items():
            values[name] = None if usual is None else values.get(name, usual)
        if optimizer != "sampa":
            values["split"] = "batches"
        if base != "sgd":
            values["momentum"] = 0.0
        if {**values, **chosen}["schedule"] != "step":
            values["milestones"] = ()
        values |= chosen
        if values.get("sparsity"):
            values.setdefault("pruner", PRUNERS[0])
        elif "pruner" not in chosen:
            values["pruner"] = None
        settings = [dict(level.get("settings") or {}) for level in (recipe, chosen)]
        values["settings"] = tuple(sorted({**known.recipe.settings, **settings[0], **settings[1]}.items()))
        if values["lr"] is None:
            raise UsageError(f"lr must be given for {base}: the recipe of task {task} has none")
        if isinstance(values["data"], (str, Path)):
            path = Path(values["data"])
            if path.is_dir() or (path.suffix and path.is_file()):  # a file named like a hub id hides no data set
                values["data"] = str(path.resolve())  # found again from anywhere
        return cls(task=task, **_plain(values))

    @classmethod
    def from_json(cls, document: Mapping[str, Any], origin: object) -> "Config":
        """The config in a JSON object, which may hold more. Raises UsageError naming its origin."""
        try:
            if not isinstance(document, Mapping):
                raise UsageError(f"it must be an object, got {described(document)}")
            optimizer = document.get("optimizer")
            own = OWN.get(optimizer, {}) if isinstance(optimizer, str) else {}  # as before a config held them
            values = {
                **own,
                **{f.name: document[f.name] for f in fields(cls) if f.name in document or f.default is MISSING},
            }
            settings = values.get("settings", {})
            if not isinstance(settings, Mapping):
                raise UsageError(f"settings must be numbers by name, got {described(settings)}")
            values["settings"] = tuple(sorted(settings.items()))
            return cls(**_plain(values))
        except KeyError as error:
            raise UsageError(f"{origin} must hold the field {error}") from None
        except UsageError as error:
            raise UsageError(f"{origin} does not describe a run: {error}") from None

    def to_json(self) -> dict[str, Any]:
        """Every field as plain values."""
        return {**asdict(self), "milestones": list(self.milestones), "settings": dict(self.settings)}

    @property
    def name(self) -> str:
        """A folder name that tells apart the cells of a sweep: optimizer, rho, width, its conditions, seed."""
        optimizer = self.label
        if self.optimizer in FAMILY:
            optimizer += f"-rho{self.rho}"
        conditions = [f"{short}{value}" for short, value in self.conditions().items()]
        return "-".join([optimizer, f"w{self.width}", *conditions, f"s{self.seed}"])

    @property
    def label(self) -> str:
        """The optimizer, with what it wraps where that is not the task's baseline, and how it is varied: sam-every2."""
        base = "" if self.optimizer not in FAMILY or self.base == tasks.get(self.task).base else f"-{self.base}"
        usual = {"every": 1, "m": 0, **_own(self.optimizer)}
        varied = [f"{name}{getattr(self, name)}" for name in usual if getattr(self, name) != usual[name]]
        varied += {"none": [], "all": ["adaptive"], "weights": ["adaptive-weights"]}[self.adaptive]
        varied += ["unnormalized"] * (not self.normalize)
        return "-".join([self.optimizer + base, *varied])

    def conditions(self) -> dict[str, Any]:
        """What a sweep may vary beside width, optimizer, rho and seed, where it differs from the task's recipe."""
        recipe = tasks.get(self.task).recipe
        found = {
            "noise": (self.label_noise, 0.0),
            "sparse": (self.sparsity, 0.0),
            "decay": (self.weight_decay, recipe.weight_decay),
        }
        return {name: value for name, (value, usual) in found.items() if value != usual}


def task_of(config: Config) -> tasks.Task:
    """The task of a run, with its settings."""
    return tasks.get(config.task).with_settings(dict(config.settings))


def _own(optimizer: str) -> dict[str, float | None]:
    """What only some of the family have: the usual value, None for what this optimizer has not."""
    return {name: OWN.get(optimizer, {}).get(name) for name in OWN_NAMES}


def check_recipe(recipe: Mapping[str, Any]) -> None:
    """Raise UsageError unless every name is a field of a recipe, or a condition of training."""
    names = [*(field.name for field in fields(tasks.Recipe)), *CONDITIONS]
    for name in recipe:
        if name not in names:
            near = get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UsageError(f"a recipe holds {', '.join(names)}, got {name!r}{hint}")
    if not isinstance(recipe.get("settings", {}), Mapping):
        raise UsageError(f"settings must be numbers by name, got {described(recipe['settings'])}")


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Whole numbers as floats where either may stand, so that 1 and 1.0 give one name, and a list as a tuple."""
    if isinstance(milestones := values["milestones"], list):
        values = {**values, "milestones": tuple(milestones)}
    names = ("rho", "lr", "momentum", "weight_decay", "dropout", "label_noise", "sparsity", "clip", *OWN_NAMES)
    return {name: float(value) if name in names and _is_whole(value) else value for name, value in values.items()}


def _is_whole(value: object) -> bool:
    """Whether this is an integer that a float can hold."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < FLOATS


def _check_settings(settings: tuple[tuple[str, float], ...], task: tasks.Task) -> None:
    known = task.recipe.settings
    for name, value in settings:
        if name not in known:
            hint = f", only {', '.join(known)}" if known else ""
            raise UsageError(f"settings must be of task {task.name}, which has no {name!r}{hint}")
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < FLOATS:
            raise UsageError(f"settings must be numbers, got {name} = {described(value)}")
    if missing := [name for name in known if name not in dict(settings)]:
        raise UsageError(f"settings must hold {', '.join(missing)}")


def usable_device(name: str) -> torch.device:
    """The device of this name. Raises UsageError where this machine cannot compute on it."""
    device = _check_device(name)
    try:
        torch.zeros(1, device=device).item()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UsageError(f"device must be usable here, got {name!r} ({reason}); use cpu") from None
    return device


def _check_device(name: object) -> torch.device:
    try:
        return torch.device(name if isinstance(name, str | torch.device) else "")
    except (RuntimeError, TypeError):
        raise UsageError(f"device must be a name such as cpu or cuda:0, got {described(name)}") from None


def _check_integer(name: str, value: object, least: int, most: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise UsageError(f"{name} must be an integer, got {described(value)}")
    if not least <= value < (2**63 if most is None else most + 1):
        limit = "below 2^63" if most is None else f"<= {most}"
        raise UsageError(f"{name} must be >= {least}{f' and {limit}' * (value > 0)}, got {described(value)}")


def _check_number(name: str, value: object, *, above: bool = False, below: float = math.inf) -> None:
    """A finite number >= 0, or > 0 with `above`, and < below."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise UsageError(f"{name} must be a number, got {described(value)}")
    if not (0 <= value < min(below, FLOATS)) or (above and value == 0):
        limit = f" and < {below}" if below < math.inf else "" if abs(value) < FLOATS else " and finite"
        raise UsageError(f"{name} must be {'>' if above else '>='} 0{limit}, got {described(value)}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{name} must be one of {', '.join(choices)}, got {described(value)}")
