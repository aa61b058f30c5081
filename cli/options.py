"""Arguments and options that several commands share, and the reading of their values."""

import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import click

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OPTIMIZERS = ("sgd", "adam", "adamw", "sam")
F = TypeVar("F", bound=Callable[..., Any])


class Numbers(click.ParamType):
    """A list such as 8,32,128, of one kind of number."""

    def __init__(self, kind: type[int] | type[float]) -> None:
        self.kind = kind
        self.name = f"{kind.__name__},..."

    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self.kind(part) for part in value.split(",")) if value else ()
        except ValueError:
            example = "8,32,128" if self.kind is int else "0.05,0.1"
            self.fail(f"{value!r} is not a list of numbers such as {example}", parameter, context)


class Names(click.ParamType):
    """A list such as sgd,sam, from given choices."""

    name = "name,..."

    def __init__(self, choices: tuple[str, ...]) -> None:
        self.choices = choices

    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> tuple[str, ...]:
        names = value if isinstance(value, tuple) else tuple(value.split(","))
        for name in names:
            if name not in self.choices:
                known = f"{name!r} is not one of {', '.join(self.choices)}"
                self.fail(known + did_you_mean(name, self.choices), parameter, context)
        return names


def did_you_mean(word: str, choices: Any) -> str:
    """A hint at the nearest choice, if one is near."""
    near = get_close_matches(word, list(choices), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def existing(context: click.Context, parameter: click.Parameter, value: str | None) -> Path | None:
    """Callback: a path that must exist, with a hint at its nearest neighbour where it does not."""
    if value is None:
        return None
    path = Path(value)
    if path.exists():
        return path
    raise click.BadParameter(f"{value!r} does not exist{_neighbour(path)}", context, parameter)


def _neighbour(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    near = get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _source(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Tell a mistyped path from a hub id: a path has a parent folder here."""
    path = Path(value or "").expanduser()
    if value is None or path.exists():
        return value and str(path)
    if value.startswith((".", "/", "~")) or (path.parent.name and path.parent.is_dir()):
        raise click.BadParameter(f"{value!r} does not exist{_neighbour(path)}", context, parameter)
    return value


def task_names(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    from samlite.tasks import TASKS

    return [name for name in TASKS if name.startswith(incomplete)]


def task_argument(command: F) -> F:
    """The task to train on; digits if not given."""
    return click.argument("task", default="digits", shell_complete=task_names)(command)


def json_option(command: F) -> F:
    """Print one JSON document instead of tables."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document, nothing else.")(
        command
    )


def recipe_options(command: F) -> F:
    """How to train: each option overrides a field of the task's recipe."""
    options = [
        click.option("--base", type=click.Choice(OPTIMIZERS[:-1]), help="The optimizer that SAM wraps."),
        click.option("--lr", type=float, help="Learning rate."),
        click.option("--momentum", type=float, help="Momentum, of SGD."),
        click.option("--weight-decay", type=float, help="Weight decay."),
        click.option(
            "--batch-size", type=int, help="Samples a step; as many as there are, or more: full batch."
        ),
        click.option("--epochs", type=int, help="Passes over the training data."),
        click.option(
            "--schedule",
            type=click.Choice(("step", "cosine", "constant")),
            help="How the learning rate falls: by 10 at milestones, along a cosine, or not.",
        ),
        click.option(
            "--milestones",
            type=Numbers(float),
            help="Where step divides by 10, in parts of all epochs: 0.5,0.75.",
        ),
        click.option(
            "--data", callback=_source, help="A hub id or a local folder, for tasks that load data."
        ),
        click.option(
            "--config",
            callback=existing,
            metavar="FILE.toml",
            help="A file of recipe fields, such as lr = 0.1.",
        ),
        click.option("--threads", type=int, help="Threads of the CPU that a run computes with."),
        click.option("--device", help="cpu, cuda, cuda:1, mps; default cuda if there is one."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def read_recipe(path: Path | None) -> dict[str, Any]:
    """The recipe fields in a TOML file."""
    if path is None:
        return {}
    from samlite.config import check_recipe

    try:
        recipe = tomllib.loads(path.read_text(encoding="utf-8"))
        check_recipe(recipe)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return recipe
