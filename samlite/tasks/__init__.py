"""The tasks: what to train on, with which network and recipe. One file a domain."""

from difflib import get_close_matches

from samlite.data.tensors import Splits, TensorData
from samlite.errors import UsageError
from samlite.files import described
from samlite.tasks import cifar10, digits, games, imagenet, mnist, molpcba, own, pos, sst2, synthetic, vit
from samlite.tasks.task import Recipe, Task

__all__ = ["TASKS", "Recipe", "Splits", "Task", "TensorData", "get"]

TASKS = {
    task.name: task
    for task in (
        *(digits.TASK, synthetic.TASK, mnist.TASK, cifar10.TASK, imagenet.TASK, vit.TASK),
        *(pos.TASK, sst2.TASK, molpcba.TASK, games.CARTPOLE, games.ATARI),
    )
}


def get(name: str) -> Task:
    """The task of this name, or of the user's own network and data. Raises UsageError that suggests the nearest one."""
    if isinstance(name, str) and name in TASKS:
        return TASKS[name]
    if own.is_own(name):
        return own.task(name)
    near = get_close_matches(str(name), TASKS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UsageError(f"task must be one of {', '.join(TASKS)}, got {described(name)}{hint}")
