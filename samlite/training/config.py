"""The resolved recipe of a run: everything that decides its result."""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from samlite import tasks
from samlite.curvature.tracking import followed
from samlite.errors import UsageError
from samlite.files import described
from samlite.training.options import BASES, CONDITIONS, FAMILY, FLOATS, OPTIMIZERS, OPTIONS, Choice, Number


@dataclass(frozen=True)
class Config:
    """One run, every field resolved. `Config.of` fills in a task's recipe."""

    task: str
    width: int
    optimizer: str
    base: str
    """The optimizer that SAM wraps; the optimizer itself where that is not SAM."""
    rho: float
    lr: float
    momentum: float
    weight_decay: float
    batch_size: int
    epochs: int
    schedule: str
    milestones: tuple[float, ...]
    """The fractions of the epochs at which the step schedule divides lr by 10."""
    threads: int
    """CPU threads. The last bits of a result depend on their number."""
    seed: int
    data: str | None
    device: str
    dropout: float | None = None
    """The dropout rate; None where the network has no dropout."""
    settings: tuple[tuple[str, float], ...] = ()
    """Settings that only this task has, by name."""
    augment: bool = False
    """Whether training inputs are altered, as the task does it."""
    label_noise: float = 0.0
    """The fraction of the training labels that move to another class."""
    train_samples: int = 0
    """The number of training samples that are used, drawn by the seed; 0 for all."""
    sparsity: float = 0.0
    """The fraction of the weights that are masked from the start."""
    pruner: str | None = None
    """What chooses the masked weights."""
    patience: int = 0
    """The number of epochs without a better validation result after which training stops; 0 never stops."""
    adaptive: str = "none"
    """What scales the perturbation (ASAM): "all" parameters, or only the "weights"."""
    normalize: bool = True
    """Whether the perturbation has length rho; else it is rho times the gradient."""
    every: int = 1
    """Perturb every `every`-th step only, and take plain steps of the base optimizer in between."""
    m: int = 0
    """The number of samples that share a perturbation (m-SAM); 0 for all of a batch."""
    sigma: float | None = None
    """The share of the mean gradient that FriendlySAM leaves out; None for other optimizers."""
    lmbda: float | None = None
    """The decay of FriendlySAM's mean gradient, or the weight of SAMPa's second gradient."""
    rho_val: float | None = None
    """The radius of AgnosticSAM on held-out data."""
    accumulate: int = 1
    """The number of micro-batches that a batch is computed in."""
    clip: float = 0.0
    """The largest norm of the gradient that is stepped with; 0 for any."""
    precision: str = "float32"
    """The precision of the forward pass in training."""
    perturb: str = "global"
    """Whether several processes perturb by the gradient of all ("global"), or each by its own ("local")."""
    split: str = "batches"
    """What several processes share out: the batches, or the two gradients of SAMPa."""
    sync_batch_norm: bool = False
    """Whether batch norm takes its statistics over all processes, on CUDA devices."""
    linearize: bool = False
    """Whether the network's first-order expansion about its first weights is trained."""
    track: int = 0
    """How many of the largest Hessian eigenvalues are recorded after every epoch."""
    track_measures: str = ""
    """The measures that are recorded beside them, by name: "batch,critical", or "all" that can be followed."""
    track_every: int = 0
    """Steps after which they are recorded within an epoch, too; 0 for its end alone."""

    def __post_init__(self) -> None:
        task = tasks.get(self.task)
        Choice(OPTIMIZERS).check("optimizer", self.optimizer)
        if self.rho and self.optimizer not in FAMILY:
            Number().check("rho", self.rho)
            raise UsageError(f"rho must be 0 without SAM, got {self.rho}; use optimizer sam")
        for name, option in OPTIONS.items():
            option.check(name, getattr(self, name), self.optimizer)
        check_device(self.device)
        self._check_together()
        self._check_tracking()
        self._check_applies(task)

    def _check_together(self) -> None:
        """Raise UsageError where two options do not go together."""
        if self.optimizer not in FAMILY and self.base != self.optimizer:
            raise UsageError(f"base must go with SAM, got {self.base} with {self.optimizer}; use optimizer sam")
        if self.lmbda is not None and (self.lmbda > 1 or (self.lmbda == 1 and self.optimizer == "friendly")):
            raise UsageError(f"lmbda must be {'<' if self.optimizer == 'friendly' else '<='} 1, got {self.lmbda}")
        if self.m and self.accumulate > 1:
            raise UsageError(f"m must be 0 with accumulate {self.accumulate}, got {self.m}; choose one of them")
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

    def _check_tracking(self) -> None:
        """Raise UsageError unless measures are tracked beside eigenvalues, and apply to the optimizer."""
        for name in ("track_measures", "track_every"):
            if getattr(self, name) and not self.track:
                raise UsageError(f"{name} must go with track, got {getattr(self, name)}; add --track 1")
        if not isinstance(self.track_measures, str):
            raise UsageError(f"track_measures must be names, got {described(self.track_measures)}")
        asked = followed(self.track_measures) if self.track_measures != "all" else []
        if "preconditioned" in asked and self.base == "sgd":
            raise UsageError("track_measures must apply, got preconditioned with sgd; use optimizer or base adam")
        if "sam-edge" in asked and (not self.rho or self.base != "sgd"):
            raise UsageError("track_measures must apply, got sam-edge without SAM around sgd; use optimizer sam")

    def tracked_measures(self) -> list[str]:
        """The measures that are recorded; of all, those that apply to the optimizer."""
        names = followed(self.track_measures)
        if self.track_measures != "all":
            return names
        absent = {"sharpness"} | ({"preconditioned"} if self.base == "sgd" else set())
        if not self.rho or self.base != "sgd":
            absent.add("sam-edge")
        return [name for name in names if name not in absent]

    def _check_applies(self, task: tasks.Task) -> None:
        """What is asked for must be something that the task has."""
        if not isinstance(self.data, str | None):
            raise UsageError(f"data must be a hub id or a path, got {described(self.data)}")
        if (self.data is None) != (task.source is None):
            needs = "not be given: the task brings its own" if task.source is None else "name a source"
            raise UsageError(f"data of task {task.name} must {needs}, got {self.data}")
        if self.dropout is not None and task.recipe.dropout is None:
            raise UsageError(f"dropout must not be given: the network of task {task.name} has none")
        _check_settings(self.settings, task)
        self._check_samples(task.with_settings(dict(self.settings)))
        if self.augment and not task.augments:
            raise UsageError(f"augment must not be given: task {task.name} has no augmentation")
        if self.label_noise and not task.classes:
            raise UsageError(
                f"label_noise must be 0 for task {task.name}, which has no classes, got {self.label_noise}"
            )
        if self.sparsity and self.pruner is None:
            OPTIONS["pruner"].kind.check("pruner", self.pruner)
        if self.pruner is not None and not self.sparsity:
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
        if self.train_samples:
            raise UsageError(f"train_samples must be 0 for task {self.task}, which plays for its samples")

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
        Choice(OPTIMIZERS).check("optimizer", optimizer)
        Choice(BASES).check("base", base)
        values = {
            "width": known.width,
            "seed": 0,
            "data": known.source,
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "augment": known.augments,
            **{name: option.usual_for(optimizer) for name, option in OPTIONS.items() if option.usual},
            **asdict(known.recipe),
            "lr": known.recipe.lr.get(base),
            **recipe,
        }
        values |= {name: option.neutral for name, option in OPTIONS.items() if optimizer not in option.only}
        if known.recipe.dropout is None:
            values["dropout"] = None
        if not known.augments:
            values["augment"] = False
        if base != "sgd":
            values["momentum"] = 0.0
        if {**values, **chosen}["schedule"] != "step":
            values["milestones"] = ()
        values |= chosen
        if values.get("sparsity"):
            values.setdefault("pruner", "random")
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
            optimizer = document.get("optimizer")  # below: as before a config held what is usual for it
            usual = {name: row.usual[optimizer] for name, row in OPTIONS.items() if optimizer in tuple(row.usual)}
            given = {f.name: document[f.name] for f in fields(cls) if f.name in document or f.default is MISSING}
            values = {**usual, **given}
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
        varied = [option.label(name, getattr(self, name), self.optimizer) for name, option in OPTIONS.items()]
        return "-".join([self.optimizer + base, *filter(None, varied)])

    def conditions(self) -> dict[str, Any]:
        """What a sweep may vary beside width, optimizer, rho and seed, where it differs from the task's recipe."""
        usual = vars(tasks.get(self.task).recipe)
        return {
            OPTIONS[name].condition: getattr(self, name)
            for name in CONDITIONS
            if getattr(self, name) != usual.get(name, 0.0)
        }


def task_of(config: Config) -> tasks.Task:
    """The task of a run, with its settings."""
    return tasks.get(config.task).with_settings(dict(config.settings))


def check_recipe(recipe: Mapping[str, Any]) -> None:
    """Raise UsageError unless every name is a field of a recipe, or a condition of training."""
    names = [field.name for field in fields(tasks.Recipe)]
    names += [name for name, option in OPTIONS.items() if option.in_recipe]
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
    numbers = {name for name, option in OPTIONS.items() if isinstance(option.kind, Number)}
    return {name: float(value) if name in numbers and _is_whole(value) else value for name, value in values.items()}


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
    device = check_device(name)
    try:
        torch.zeros(1, device=device).item()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UsageError(f"device must be usable here, got {name!r} ({reason}); use cpu") from None
    return device


def check_device(name: object) -> torch.device:
    try:
        return torch.device(name if isinstance(name, str | torch.device) else "")
    except (RuntimeError, TypeError):
        raise UsageError(f"device must be a name such as cpu or cuda:0, got {described(name)}") from None
