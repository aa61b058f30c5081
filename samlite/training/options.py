"""Everything that a run can be told: one row an option, read by the config, the command line, sweeps and reports.

Nothing here needs torch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from samlite.errors import UsageError
from samlite.files import described

BASES = ("sgd", "adam", "adamw")
FAMILY = ("sam", "friendly", "agnostic", "sampa")
OPTIMIZERS = (*BASES, *FAMILY)
FLOATS = 2.0**1023
"""Every number below this can be a float."""


# What values an option takes


@dataclass(frozen=True)
class Integer:
    """An integer from `least` to `most`."""

    least: int = 0
    most: int | None = None

    def check(self, name: str, value: object) -> None:
        """Raise UsageError unless the value is one."""
        if not isinstance(value, int) or isinstance(value, bool):
            raise UsageError(f"{name} must be an integer, got {described(value)}")
        if not self.least <= value < (2**63 if self.most is None else self.most + 1):
            limit = "below 2^63" if self.most is None else f"<= {self.most}"
            bound = f" and {limit}" if value > 0 else ""
            raise UsageError(f"{name} must be >= {self.least}{bound}, got {described(value)}")


@dataclass(frozen=True)
class Number:
    """A finite number >= 0, or > 0 with `positive`, and < `below`."""

    positive: bool = False
    below: float = math.inf

    def check(self, name: str, value: object) -> None:
        """Raise UsageError unless the value is one."""
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise UsageError(f"{name} must be a number, got {described(value)}")
        if not (0 <= value < min(self.below, FLOATS)) or (self.positive and value == 0):
            limit = f" and < {self.below}" if self.below < math.inf else "" if abs(value) < FLOATS else " and finite"
            raise UsageError(f"{name} must be {'>' if self.positive else '>='} 0{limit}, got {described(value)}")


@dataclass(frozen=True)
class Numbers:
    """A list of numbers."""

    each: Number

    def check(self, name: str, value: object) -> None:
        """Raise UsageError unless the value is one."""
        if not isinstance(value, tuple):
            raise UsageError(f"{name} must be a list of numbers, got {described(value)}")
        for number in value:
            self.each.check(name, number)


@dataclass(frozen=True)
class Choice:
    """One of some names."""

    names: tuple[str, ...]

    def check(self, name: str, value: object) -> None:
        """Raise UsageError unless the value is one."""
        if value not in self.names:
            raise UsageError(f"{name} must be one of {', '.join(self.names)}, got {described(value)}")


@dataclass(frozen=True)
class Flag:
    """True or false."""

    off: bool = False
    """Whether the command line has `--no-...`, too."""

    def check(self, name: str, value: object) -> None:
        """Raise UsageError unless the value is one."""
        if not isinstance(value, bool):
            raise UsageError(f"{name} must be true or false, got {described(value)}")


@dataclass(frozen=True)
class Text:
    """A text, which the config checks by itself."""

    def check(self, name: str, value: object) -> None:
        """Every value passes."""


@dataclass(frozen=True)
class Settings:
    """Numbers by name, which the task checks."""

    def check(self, name: str, value: object) -> None:
        """Every value passes."""


Kind = Integer | Number | Numbers | Choice | Flag | Text | Settings
Group = Literal["run", "recipe", "process", "seed", "track"]


@dataclass(frozen=True)
class Option:
    """What is known of an option."""

    kind: Kind
    help: str
    group: Group = "recipe"
    """With which other options the command line lists it."""
    metavar: str | None = None
    only: tuple[str, ...] = OPTIMIZERS
    """The optimizers that have it."""
    neutral: Any = None
    """Its value for the other optimizers."""
    usual: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Its default by optimizer, where that is not the neutral value."""
    optional: bool = False
    """Whether None is a value."""
    in_recipe: bool = False
    """Whether a recipe file may set it although a task's recipe does not hold it."""
    swept: bool = False
    """Whether the cells of one sweep may differ in it."""
    condition: str = ""
    """Its short name in the name of a cell, where a sweep varies it beside width, optimizer, rho and seed."""
    in_label: bool = False
    """Whether the label of an optimizer says its value where that is not the usual one."""
    labels: Mapping[Any, str] = field(default_factory=lambda: MappingProxyType({}))
    """What it adds to that label by its value; by default its name and the value."""

    def usual_for(self, optimizer: str) -> Any:
        """Its usual value for an optimizer."""
        return self.usual.get(optimizer, self.neutral)

    def label(self, name: str, value: object, optimizer: str) -> str:
        """What the label of an optimizer says of this value; nothing of the usual one."""
        if not self.in_label or value == self.usual_for(optimizer):
            return ""
        return self.labels.get(value, f"{name}{value}")

    def check(self, name: str, value: object, optimizer: str) -> None:
        """Raise UsageError unless this is a value, and for an optimizer without this option the neutral one."""
        if value is not None or (optimizer in self.only and not self.optional):
            self.kind.check(name, value)
        if optimizer in self.only or value == self.neutral:
            return
        use = f"use optimizer {' or '.join(self.only)}"
        if isinstance(self.neutral, bool):
            raise UsageError(f"{name} must not be given for {optimizer}; {use}")
        rule = "not be given" if self.neutral is None else f"be {self.neutral}"
        raise UsageError(f"{name} must {rule} for {optimizer}, got {value}; {use}")


def _variant(kind: Kind, help: str, neutral: Any = None, **kwargs: Any) -> Option:
    """An option by which one optimizer becomes several that a sweep may compare."""
    return Option(kind, help, neutral=neutral, in_recipe=True, swept=True, in_label=True, **kwargs)


OPTIONS: dict[str, Option] = {
    "width": Option(Integer(1), "Width of the first layer; the others scale with it.", "run", swept=True),
    "optimizer": Option(Choice(OPTIMIZERS), "Default: the task's baseline, such as sgd.", "run", swept=True),
    "rho": Option(Number(), "Radius of SAM's perturbation.", "run", only=FAMILY, neutral=0.0, swept=True),
    "label_noise": Option(
        Number(below=1),
        "Fraction of the training labels that moves to another class.",
        "run",
        in_recipe=True,
        swept=True,
        condition="noise",
    ),
    "train_samples": Option(
        Integer(),
        "Training samples to use, drawn by the seed; default all.",
        "run",
        metavar="N",
        neutral=0,
        in_recipe=True,
        swept=True,
        condition="samples",
    ),
    "sparsity": Option(
        Number(below=1),
        "Fraction of the weights of linear and convolution layers masked from the start.",
        "run",
        in_recipe=True,
        swept=True,
        condition="sparse",
    ),
    "base": Option(Choice(BASES), "The optimizer that SAM wraps.", swept=True),
    "lr": Option(Number(positive=True), "Learning rate."),
    "momentum": Option(Number(below=1), "Momentum of SGD."),
    "weight_decay": Option(Number(), "Weight decay.", swept=True, condition="decay"),
    "dropout": Option(Number(below=1), "Dropout, where the network has it.", optional=True),
    "batch_size": Option(Integer(1), "Samples a step; full batch if there are no more."),
    "epochs": Option(Integer(1), "Passes over the training data."),
    "schedule": Option(
        Choice(("step", "cosine", "constant")), "The learning rate falls by 10 at milestones, along a cosine, or not."
    ),
    "milestones": Option(
        Numbers(Number(positive=True, below=1)), "Of step, as fractions of the epochs: 0.5,0.75.", metavar="X,..."
    ),
    "data": Option(Text(), "Where a task loads its data from.", metavar="ID_OR_PATH"),
    "settings": Option(Settings(), "A setting that only this task has; may be repeated.", metavar="NAME=X"),
    "pruner": Option(
        Choice(("random", "snip", "magnitude")),
        "What chooses the masked weights; default random.",
        optional=True,
        in_recipe=True,
    ),
    "augment": Option(Flag(off=True), "Alter training inputs; default: as the task does.", in_recipe=True),
    "patience": Option(Integer(), "Stop N epochs after the best validation.", metavar="N", in_recipe=True),
    "every": _variant(
        Integer(1),
        "Perturb every K steps; the base optimizer steps between.",
        1,
        only=("sam", "friendly"),
        metavar="K",
    ),
    "m": _variant(Integer(), "Samples that share SAM's perturbation (m-SAM); default the batch.", 0, only=("sam",)),
    "sigma": _variant(
        Number(),
        "Of friendly: how much of the mean gradient is left out; default 1.",
        only=("friendly",),
        usual={"friendly": 1.0},
    ),
    "lmbda": _variant(
        Number(),
        "Of friendly: decay of the mean gradient, default 0.9; of sampa: weight of its second, default 0.2.",
        only=("friendly", "sampa"),
        usual={"friendly": 0.9, "sampa": 0.2},
    ),
    "rho_val": _variant(
        Number(), "Of agnostic: radius on held-out data; default 0.05.", only=("agnostic",), usual={"agnostic": 0.05}
    ),
    "adaptive": _variant(
        Choice(("none", "all", "weights")),
        "What scales the perturbation (ASAM): all parameters, or the weights without biases and norms.",
        "none",
        only=("sam", "friendly", "sampa"),
        labels={"all": "adaptive", "weights": "adaptive-weights"},
    ),
    "normalize": _variant(
        Flag(off=True),
        "Divide the perturbation by its gradient's norm; the default.",
        True,
        only=FAMILY,
        labels={False: "unnormalized"},
    ),
    "accumulate": Option(Integer(1), "Compute every batch in N micro-batches.", metavar="N", in_recipe=True),
    "clip": Option(Number(), "Largest norm of the gradient that is stepped with.", in_recipe=True),
    "precision": Option(
        Choice(("float32", "bfloat16", "float16")),
        "Of the forward pass in training; default float32.",
        in_recipe=True,
    ),
    "linearize": Option(Flag(), "Train the first-order expansion of the network.", in_recipe=True),
    # A process that cannot start all of its threads is aborted.
    "threads": Option(Integer(1, most=1024), "Threads of the CPU for a run."),
    "device": Option(Text(), "cpu, cuda, cuda:1, mps; default cuda if there is one."),
    "perturb": Option(
        Choice(("global", "local")),
        "Under torchrun: by the gradient of all processes, or each by its own; default global.",
        neutral="global",
        only=("sam",),
        group="process",
        in_recipe=True,
    ),
    "split": Option(
        Choice(("batches", "gradients")),
        "Under torchrun: what the processes share out; default batches, gradients are the two of sampa.",
        neutral="batches",
        only=("sampa",),
        group="process",
        in_recipe=True,
    ),
    "sync_batch_norm": Option(Flag(), "Under torchrun: statistics over all GPUs.", "process", in_recipe=True),
    "seed": Option(Integer(), "Of the initial weights and the order of batches.", "seed", swept=True),
    "track": Option(Integer(), "Record the top K Hessian eigenvalues an epoch.", "track", metavar="K"),
    "track_measures": Option(
        Text(), "Beside --track: batch, critical, edge and others (see docs/measures.md), or all.", "track", "NAME,..."
    ),
    "track_every": Option(Integer(), "Record also after every N steps within an epoch.", "track", metavar="N"),
}
OPTIMIZER_OPTIONS = ("optimizer", *(name for name, option in OPTIONS.items() if option.only != OPTIMIZERS))
"""The options in which a run may differ from that of its base optimizer."""
SWEPT = frozenset(name for name, option in OPTIONS.items() if option.swept)
"""The options in which the cells of one sweep may differ."""
CONDITIONS = tuple(name for name, option in OPTIONS.items() if option.condition)
"""What a sweep may vary beside width, optimizer, rho and seed."""
