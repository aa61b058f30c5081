"""Arguments and options that several commands share, and the reading of their values."""

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import click

from samlite.errors import UsageError
from samlite.files import regular
from samlite.training.options import OPTIONS, Choice, Flag, Integer, Number, Numbers, Settings, Text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

Command = TypeVar("Command", bound=Callable[..., Any])


class CommaList(click.ParamType):
    """A list such as 8,32,128 as a tuple; its items are numbers, or some of these names."""

    def __init__(self, item: str, names: Sequence[str] = (), *, example: str = "", empty: bool = False) -> None:
        self.name, self.names, self.example, self.empty = item, names, example, empty

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return {"integer": "N,...", "number": "X,..."}.get(self.name, "NAME,...")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        if not value and self.empty:
            return ()
        if self.names:
            return tuple(self._check(name) for name in value.split(","))
        try:
            return tuple(map(int if self.name == "integer" else float, value.split(",")))
        except ValueError:
            raise click.BadParameter(f"{value!r} is not a list of {self.name}s such as {self.example}") from None

    def _check(self, name: str) -> str:
        if name not in self.names:
            hint = did_you_mean(name, self.names)
            raise click.BadParameter(f"{name!r} is not one of {', '.join(self.names)}{hint}")
        return name


class Measures(CommaList):
    """A list such as eigenvalues,moments, or none alone; moments bring eigenvalues with them."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if isinstance(value, str) and "none" in value.split(",") and value != "none":
            raise click.BadParameter(f"none must stand alone, got {value!r}")
        names = super().convert(value, param, ctx)
        return () if "none" in names else ("eigenvalues", "moments") if "moments" in names else ("eigenvalues",)


class Radii(CommaList):
    """A list of numbers, or auto."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == "auto" else super().convert(value, param, ctx)


INTEGERS = CommaList("integer", example="8,32,128")
NUMBERS = CommaList("number", example="0.05,0.1", empty=True)
RADII = Radii("number", example="0.05,0.1, or auto", empty=True)
MEASURES = Measures("name", ("eigenvalues", "moments", "none"))


# Callbacks: (context, parameter, text or None if not given) -> value


def assignments(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> dict[str, float] | None:
    """Settings such as clip=0.2."""
    settings = {}
    for text in value:
        name, _, number = text.partition("=")
        try:
            settings[name] = float(number)
        except ValueError:
            raise click.BadParameter(f"{text!r} is not a number by name such as clip=0.2") from None
    return settings or None


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


def own_options(command: Command) -> Command:
    """A network, data and a loss of one's own in place of a task."""
    text = (
        "Your own network instead of TASK: a function of the width. --data then names a function that returns splits."
    )
    return _with(
        command,
        [
            click.option("--model", metavar="PKG.MOD:FACTORY", help=text),
            click.option(
                "--loss",
                metavar="LOSS",
                help="With --model: cross_entropy (the default), mse, or pkg.mod:criterion of (outputs, targets).",
            ),
        ],
    )


def named_task(task: str, model: str | None, data: str | None, loss: str | None) -> tuple[str, str | None]:
    """(The name of the task, the source of its data): of TASK, or of one's own network."""
    if model is None:
        if loss is not None:
            raise UsageError(f"--loss must go with --model, got {loss}; leave it out")
        return task, data
    given = click.get_current_context().get_parameter_source("task")
    if given is not click.core.ParameterSource.DEFAULT:
        raise UsageError(f"TASK must not be given with --model, got {task}; leave one of them out")
    if data is None:
        raise UsageError("--model needs --data pkg.mod:splits, a function that returns (train, test), got none")
    from samlite.tasks.own import name_of

    return name_of(model, data, loss or "cross_entropy"), None


def folder_of(task: str) -> Path:
    """The folder in which runs of a task are by default; its name has no spaces."""
    return Path("runs") / re.sub(r"[^\w.-]+", "-", task)


def json_option(command: Command) -> Command:
    """Print one JSON document instead of tables."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document, nothing else.")(command)


def _with(command: Command, options: Iterable[Callable[[Command], Command]]) -> Command:
    """The command with these options, which its help lists in this order."""
    for option in reversed(list(options)):
        command = option(command)
    return command


def _option(name: str) -> Callable[[Command], Command]:
    """The option of the command line for a row of the table. It is None where it is not given."""
    row, dashed = OPTIONS[name], name.replace("_", "-")
    flag, how = f"--{dashed}", dict[str, Any](help=row.help, metavar=row.metavar)
    match row.kind:
        case Integer():
            how["type"] = int
        case Number():
            how["type"] = float
        case Numbers():
            how["type"] = NUMBERS
        case Choice(names=names):
            how["type"] = click.Choice(names)
        case Flag(off=off):
            flag += f"/--no-{dashed}" if off else ""
            how |= {"is_flag": True, "default": None}
        case Settings():
            return click.option("--set", name, callback=assignments, multiple=True, **how)
        case Text() if name == "data":
            how["callback"] = source
    return click.option(flag, **how)


def _group(group: str) -> list[Callable[[Command], Command]]:
    return [_option(name) for name, row in OPTIONS.items() if row.group == group]


def run_options(command: Command) -> Command:
    """What a single run is told first."""
    return _with(command, _group("run"))


def recipe_options(command: Command) -> Command:
    """How to train: each option overrides a field of the task's recipe."""
    text = "Recipe fields in a file, such as lr = 0.1."
    config = click.option("--config", callback=existing, metavar="FILE.toml", help=text)
    return _with(command, [*_group("recipe"), config])


def process_options(command: Command) -> Command:
    """How several processes train one network."""
    return _with(command, _group("process"))


def seed_option(command: Command) -> Command:
    """What everything random is drawn from."""
    return click.option("--seed", type=int, default=0, show_default=True, help=OPTIONS["seed"].help)(command)


def track_options(command: Command) -> Command:
    """What is followed in training."""

    def integer(name: str) -> Callable[[Command], Command]:
        row = OPTIONS[name]
        flag = f"--{name.replace('_', '-')}"
        return click.option(flag, type=click.IntRange(min=1), metavar=row.metavar, help=row.help)

    row = OPTIONS["track_measures"]
    names = click.option("--track-measures", metavar=row.metavar, help=row.help)
    return _with(command, [integer("track"), names, integer("track_every")])


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
