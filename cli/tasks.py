"""`samlite tasks`."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from samlite.cli.console import facts, print_json, stdout, table
from samlite.cli.options import json_option, task_names
from samlite.errors import install_command

if TYPE_CHECKING:
    from samlite.tasks import Task


@click.command(short_help="List the tasks, or show one with its recipe.")
@click.argument("task", required=False, shell_complete=task_names)
@json_option
def tasks(task: str | None, as_json: bool) -> None:
    """List what can be trained; with TASK, show its data, its recipe and its parameters by width.

    \b
    Examples:
      samlite tasks
      samlite tasks mnist
    """
    from samlite.tasks import TASKS, get

    shown = [get(task)] if task else list(TASKS.values())
    if as_json:
        documents = [_document(each) for each in shown]
        print_json(documents[0] if task else documents)
    elif task:
        _show(shown[0])
    else:
        view = table("", "task", "what", "network", "metric", ">parameters")
        for each in shown:
            counts = list(_parameters(each).values())
            view.add_row(each.name, each.summary, each.network, each.metric, f"{counts[0]} to {counts[-1]}")
        stdout.print(view)


def _show(task: "Task") -> None:
    recipe = asdict(task.recipe)
    recipe["lr"] = ", ".join(f"{value:g} {base}" for base, value in recipe["lr"].items())
    recipe["milestones"] = ", ".join(map(str, recipe["milestones"])) + " of the epochs"
    recipe |= {f"--set {name}": value for name, value in recipe.pop("settings").items()}
    view = facts(f"{task.name}: {task.summary}")
    view.add_row("network", task.network)
    view.add_row("parameters", ", ".join(f"width {width}: {n}" for width, n in _parameters(task).items()))
    view.add_row("data", task.data)
    if task.extra:
        view.add_row("needs", install_command(task.extra))
    if task.source:
        view.add_row("source", f"--data, by default {task.source}")
    view.add_row("test metric", f"{task.metric}, {'higher' if task.higher_is_better else 'lower'} is better")
    view.add_row("optimizers", f"{task.base} and SAM around it")
    for name, value in recipe.items():
        if value is not None and not (name == "milestones" and task.recipe.schedule != "step"):
            view.add_row(name.replace("_", " "), str(value))
    if task.augments:
        view.add_row("augmentation", "yes, unless --no-augment")
    stdout.print(view)
    data = " --data ID_OR_PATH" if task.source else ""
    stdout.print(f"samlite train {task.name} --width {task.width}{data}")
    stdout.print(f"samlite sweep {task.name} --widths {','.join(map(str, task.widths))}{data}")


def _parameters(task: "Task") -> dict[int, str]:
    from samlite.models import count_in_short

    return {width: count_in_short(task.parameters(width)) for width in task.widths}


def _document(task: "Task") -> dict[str, Any]:
    names = ("name", "summary", "network", "data", "source", "metric", "width")
    return {
        **{name: getattr(task, name) for name in names},
        "parameters": {width: task.parameters(width) for width in task.widths},
        "needs": task.extra,
        "base": task.base,
        "augments": task.augments,
        "recipe": asdict(task.recipe),
    }
