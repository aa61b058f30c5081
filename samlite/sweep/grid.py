"""A grid of runs: widths, conditions, optimizers, seeds and rhos."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from samlite import tasks
from samlite.errors import UsageError
from samlite.files import described, read_json
from samlite.training.config import Config
from samlite.training.options import FAMILY, SWEPT

SWEEP = "sweep.json"  # the cells of a sweep, in its folder
CELLS = 10_000  # of a sweep at most: each is a process, and a folder


def grid(
    task: str,
    widths: Sequence[int],
    optimizers: Sequence[str] = (),
    seeds: int = 3,
    rhos: Sequence[float] = (),
    *,
    label_noises: Sequence[float] = (),
    train_samples: Sequence[int] = (),
    sparsities: Sequence[float] = (),
    weight_decays: Sequence[float] = (),
    recipe: Mapping[str, Any] | None = None,
    **settings: Any,
) -> list[Config]:
    """The cells, ordered so that what is compared is finished together.

    Args:
        optimizers: default the task's baseline and SAM.
        seeds: how many, counted from 0.
        rhos: for SAM; default the recipe's.
        label_noises, train_samples, sparsities, weight_decays: conditions, every combination of which is swept.
        recipe, settings: as of `Config.of`. SAM wraps `base`, by default the first other optimizer.
    """
    optimizers = optimizers or (tasks.get(task).base, "sam")
    if not widths:
        raise UsageError("widths must name at least one, got none")
    if seeds < 1:
        raise UsageError(f"seeds must be >= 1, got {seeds}")
    if rhos and not set(FAMILY) & set(optimizers):
        raise UsageError(f"rhos must go with sam among the optimizers, got {', '.join(optimizers)}")
    base = settings.pop("base", None) or next((name for name in optimizers if name not in FAMILY), None)
    conditions: list[dict[str, Any]] = [
        {"label_noise": noise, "train_samples": samples, "sparsity": sparsity, "weight_decay": decay}
        for noise in label_noises or (None,)
        for samples in train_samples or (None,)
        for sparsity in sparsities or (None,)
        for decay in weight_decays or (None,)
    ]
    methods: list[dict[str, Any]] = []
    for optimizer in optimizers:
        own = {"base": base} if optimizer in FAMILY else {}
        methods += [{"optimizer": optimizer, "rho": rho, **own} for rho in (rhos if own and rhos else (None,))]
    count = len(widths) * len(conditions) * seeds * len(methods)
    if count > CELLS:
        raise UsageError(f"a sweep must have at most {CELLS:,} runs, got {described(count)}; ask for fewer seeds")
    cells = []
    for width in widths:
        for condition in conditions:
            for seed in range(seeds):
                for method in methods:
                    cells.append(Config.of(task, recipe, width=width, seed=seed, **condition, **method, **settings))
    return list(dict.fromkeys(cells))


def read_cells(folder: Path) -> list[Config]:
    """Read the cells of a sweep. Raises UsageError where the folder holds none."""
    path = folder / SWEEP
    if not path.exists():
        raise UsageError(f"{folder} must be the folder of a sweep, but it has no {SWEEP}")
    cells = read_json(path).get("cells")
    if not isinstance(cells, list) or not all(isinstance(cell, dict) for cell in cells):
        raise UsageError(f"{path} must hold a list of cells")
    return [Config.from_json(cell, path) for cell in cells]


def check_one_sweep(known: Sequence[Config], cells: Sequence[Config], folder: Path) -> None:
    """Raise UsageError unless these cells belong to the sweep that the folder holds."""
    for old in _kinds(known):
        for new in _kinds(cells):
            if differences := _differences(old, new):
                raise UsageError(f"{folder} holds another sweep ({differences}); choose another folder")


def _kinds(cells: Sequence[Config]) -> list[Config]:
    """One cell of each kind that `_differences` can tell apart."""
    kinds: dict[Any, Config] = {}
    for cell in cells:
        common = tuple(value for name, value in vars(cell).items() if name not in SWEPT)
        kinds.setdefault((common, cell.base, bool(cell.sparsity)), cell)
    return list(kinds.values())


def _differences(old: Config, new: Config) -> str:
    """What two cells of one sweep must have in common, but do not."""
    own = set(SWEPT)
    if not (old.sparsity and new.sparsity):
        own.add("pruner")
    if old.base != new.base:
        own |= {"lr", "momentum"}
    return "; ".join(
        f"{name} {getattr(old, name)} there, {getattr(new, name)} now"
        for name in old.to_json()
        if name not in own and getattr(old, name) != getattr(new, name)
    )
