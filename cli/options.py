"""Arguments and options that several commands share, and the reading of their values."""

import sys
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import click

from samlite.errors import UsageError
from samlite.files import regular

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

# As in samlite.config and samlite.sweep, which need torch.
BASES = ("sgd", "adam", "adamw")
OPTIMIZERS = (*BASES, "sam", "friendly", "agnostic", "sampa")
PRUNERS = ("random", "snip", "magnitude")
PRECISIONS = ("float32", "bfloat16", "float16")
SPLITS = ("batches", "gradients")
SCALED = ("none", "all", "weights")
PERTURBATIONS = ("global", "local")
MEASURES = ("eigenvalues", "moments")

Command = TypeVar("Command", bound=Callable[..., Any])


# Callbacks: (context, parameter, text or None if not given) -> value


def integers(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """A list such as 8,32,128."""
    try:
        return None if value is None else tuple(map(int, value.split(",")))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of integers such as 8,32,128") from None


def numbers(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    """A list such as 0.05,0.1; it may be empty."""
    try:
        return None if value is None else tuple(map(float, value.split(","))) if value else ()
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers such as 0.05,0.1") from None


def assignments(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> dict[str, float] | None:
    """Settings such as clip=0.2."""
    found = {}
    for text in value:
        name, _, number = text.partition("=")
        try:
            found[name] = float(number)
        except ValueError:
            raise click.BadParameter(f"{text!r} is not a number by name such as clip=0.2") from None
    return found or None


def optimizers(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """A list such as sgd,sam."""
    if value is None:
        return None
    names = tuple(value.split(","))
    for name in names:
        if name not in OPTIMIZERS:
            hint = did_you_mean(name, OPTIMIZERS)
            raise click.BadParameter(f"{name!r} is not one of {', '.join(OPTIMIZERS)}{hint}")
    return names


def measures(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    """A list such as eigenvalues,moments, or none alone; moments bring eigenvalues with them."""
    names = value.split(",")
    if names == ["none"]:
        return ()
    for name in names:
        if name == "none":
            raise click.BadParameter(f"none must stand alone, got {value!r}")
        if name not in MEASURES:
            hint = did_you_mean(name, MEASURES)
            raise click.BadParameter(f"{name!r} is not one of {', '.join(MEASURES)}, none{hint}")
    return MEASURES if "moments" in names else ("eigenvalues",)


def existing(context: click.Context, parameter: click.Parameter, value: str | None) -> Path | None:
    """A path that must exist."""
    if value is not None and not Path(value).exists():
        raise _missing(Path(value))
    return None if value is None else Path(value)


def source(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """A local path or a hub id. A mistyped path is told from a hub id by its parent folder, which exists."""
    if value is None or Path(value).exists():
        return value
    parent = Path(value).parent
    if value.startswith((".", "/", "~")) or (parent.name and parent.is_dir()):
        raise _missing(Path(value))
    return value


def _missing(path: Path) -> click.BadParameter:
    try:
        neighbours = [str(entry) for entry in path.parent.iterdir()]
    except OSError:
        neighbours = []
    return click.BadParameter(f"{str(path)!r} does not exist{did_you_mean(str(path), neighbours)}")


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A hint at the nearest choice, if one is near."""
    near = get_close_matches(word, list(choices), n=1)
    return f"; did you mean {near[0]}?" if near else ""


# Decorators


def task_names(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """What the shell completes a task to."""
    from samlite.tasks import TASKS

    return [name for name in TASKS if name.startswith(incomplete)]


def task_argument(command: Command) -> Command:
    """The task to train on; digits if not given."""
    return click.argument("task", default="digits", shell_complete=task_names)(command)


def json_option(command: Command) -> Command:
    """Print one JSON document instead of tables."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document, nothing else.")(command)


def _with(command: Command, options: Sequence[Callable[[Command], Command]]) -> Command:
    """The command with these options, which its help lists in this order."""
    for option in reversed(options):
        command = option(command)
    return command


def process_options(command: Command) -> Command:
    """How several processes train one network."""
    options = (
        click.option(
            "--perturb",
            type=click.Choice(PERTURBATIONS),
            help="Under torchrun: by the gradient of all processes, or each by its own; default global.",
        ),
        click.option(
            "--split",
            type=click.Choice(SPLITS),
            help="Under torchrun: what the processes share out; default batches, gradients are the two of sampa.",
        ),
        click.option("--sync-batch-norm", is_flag=True, default=None, help="Under torchrun: statistics over all GPUs."),
    )
    return _with(command, options)


def recipe_options(command: Command) -> Command:
    """How to train: each option overrides a field of the task's recipe."""
    options = (
        click.option("--base", type=click.Choice(BASES), help="The optimizer that SAM wraps."),
        click.option("--lr", type=float, help="Learning rate."),
        click.option("--momentum", type=float, help="Momentum of SGD."),
        click.option("--weight-decay", type=float, help="Weight decay."),
        click.option("--dropout", type=float, help="Dropout, where the network has it."),
        click.option("--batch-size", type=int, help="Samples a step; full batch if there are no more."),
        click.option("--epochs", type=int, help="Passes over the training data."),
        click.option(
            "--schedule",
            type=click.Choice(("step", "cosine", "constant")),
            help="The learning rate falls by 10 at milestones, along a cosine, or not.",
        ),
        click.option(
            "--milestones", callback=numbers, metavar="X,...", help="Of step, as fractions of the epochs: 0.5,0.75."
        ),
        click.option("--data", callback=source, metavar="ID_OR_PATH", help="Where a task loads its data from."),
        click.option(
            "--config", callback=existing, metavar="FILE.toml", help="Recipe fields in a file, such as lr = 0.1."
        ),
        click.option(
            "--set",
            "settings",
            callback=assignments,
            multiple=True,
            metavar="NAME=X",
            help="A setting that only this task has; may be repeated.",
        ),
        click.option("--pruner", type=click.Choice(PRUNERS), help="What chooses the masked weights; default random."),
        click.option("--augment/--no-augment", default=None, help="Alter training inputs; default: as the task does."),
        click.option(
            "--patience",
            type=int,
            metavar="N",
            help="Stop N epochs after the best validation.",
        ),
        click.option(
            "--adaptive",
            type=click.Choice(SCALED),
            help="What scales the perturbation (ASAM): all parameters, or the weights without biases and norms.",
        ),
        click.option(
            "--normalize/--no-normalize",
            default=None,
            help="Divide the perturbation by its gradient's norm; the default.",
        ),
        click.option("--every", type=int, metavar="K", help="Perturb every K steps; the base optimizer steps between."),
        click.option("--m", type=int, help="Samples that share SAM's perturbation (m-SAM); default the batch."),
        click.option("--sigma", type=float, help="Of friendly: how much of the mean gradient is left out; default 1."),
        click.option(
            "--lmbda",
            type=float,
            help="Of friendly: decay of the mean gradient, default 0.9; of sampa: weight of its second, default 0.2.",
        ),
        click.option("--rho-val", type=float, help="Of agnostic: radius on held-out data; default 0.05."),
        click.option("--accumulate", type=int, metavar="N", help="Compute every batch in N micro-batches."),
        click.option("--clip", type=float, help="Largest norm of the gradient that is stepped with."),
        click.option(
            "--precision", type=click.Choice(PRECISIONS), help="Of the forward pass in training; default float32."
        ),
        click.option("--linearize", is_flag=True, default=None, help="Train the first-order expansion of the network."),
        click.option("--threads", type=int, help="Threads of the CPU for a run."),
        click.option("--device", help="cpu, cuda, cuda:1, mps; default cuda if there is one."),
    )
    return _with(command, options)


def read_recipe(path: Path | None) -> dict[str, Any]:
    """The recipe fields in a TOML file."""
    if path is None:
        return {}
    from samlite.training.config import check_recipe

    regular(path)
    try:
        recipe: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        check_recipe(recipe)
    except RecursionError:
        raise UsageError(f"{path}: it is nested too deeply") from None
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from None
    return recipe
