"""A grid of runs: widths, conditions, optimizers, seeds and rhos, each cell in a process of its own.

A cell is `samlite train` in a subfolder, so it resumes where it was stopped, and one that crashes
takes nothing else with it. Each computes with the threads of its config, however many cells run at
once, so that results do not depend on that.
"""

import time
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from samlite import tasks
from samlite.errors import UsageError
from samlite.files import described
from samlite.sweep.engines import Engine, Local, Running
from samlite.training.checkpoints import claimed, locked, write_json
from samlite.training.config import FAMILY, OWN_NAMES, Config
from samlite.training.documents import RESULT, SWEEP, read_cells, read_config, read_sharpness

CLAIMS = ".claims"  # a file for each cell that a sweep works on
CELLS = 10_000  # of a sweep at most: each is a process, and a folder
OWN_OF_CELLS = (  # fields in which the cells of one sweep may differ
    *("width", "optimizer", "base", "rho", "seed", "label_noise", "sparsity", "weight_decay"),
    *("adaptive", "normalize", *OWN_NAMES, "every", "m"),
)
MEASURES = ("eigenvalues", "moments")  # what may be measured of a minimum; moments are never kept without eigenvalues


@dataclass(frozen=True)
class Event:
    """What happened to a cell. "done": an earlier sweep finished it."""

    cell: Config
    state: Literal["done", "started", "finished", "failed"]
    reason: str = ""


def grid(
    task: str,
    widths: Sequence[int],
    optimizers: Sequence[str] = (),
    seeds: int = 3,
    rhos: Sequence[float] = (),
    *,
    label_noises: Sequence[float] = (),
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
        label_noises, sparsities, weight_decays: conditions, every combination of which is swept.
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
        {"label_noise": noise, "sparsity": sparsity, "weight_decay": decay}
        for noise in label_noises or (None,)
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
    for cell in cells:
        tasks.get(task).configured(cell)  # what the task cannot do shows before anything is written
    return list(dict.fromkeys(cells))


def run(
    folder: Path | str,
    cells: Sequence[Config],
    *,
    measure: Collection[str] = (),
    jobs: int = 1,
    engine: Engine | None = None,
) -> Generator[Event, None, None]:
    """Run the cells that are not finished, `jobs` at a time, and yield what happens.

    The cells join those that the folder's sweep.json already records. Closing the iterator stops the
    running ones; they resume when the sweep is repeated. Several processes may run sweeps in one folder: each cell is
    claimed by one of them, and let go when that ends, however it ends.

    Args:
        measure: of `MEASURES`, taken of every minimum that lacks it.
        engine: where cells run; default in processes of this machine.

    Raises:
        UsageError: the folder holds something else, or a sweep with another recipe.
    """
    for name in measure:
        if name not in MEASURES:
            raise UsageError(f"measure must be of {', '.join(MEASURES)}, got {name!r}")
    if jobs < 1:
        raise UsageError(f"jobs must be >= 1, got {jobs}")
    folder, engine = Path(folder), engine or Local()
    _merged(folder, cells)  # before anything is written there
    with locked(folder):
        write_json(folder / SWEEP, {"cells": [cell.to_json() for cell in _merged(folder, cells)]})
    waiting = []
    for cell in cells:
        if finished(folder / cell.name, cell, measure):
            yield Event(cell, "done")
        else:
            waiting.append(cell)
    running: list[tuple[Config, Running, IO[str]]] = []
    try:
        while waiting or running:
            for cell in list(waiting):
                if len(running) == jobs:
                    break
                claim = claimed(folder / CLAIMS / cell.name)
                if claim is None:  # by another sweep, which may yet be killed
                    continue
                waiting.remove(cell)
                if finished(folder / cell.name, cell, measure):
                    claim.close()
                    yield Event(cell, "done")
                else:
                    running.append((cell, engine.start(folder, cell, measure), claim))
                    yield Event(cell, "started")
            time.sleep(0.02 if running else 0.5)
            for one in [one for one in running if one[1].ended()]:
                running.remove(one)
                cell, process, claim = one
                reason = process.failure()
                claim.close()
                yield Event(cell, "failed" if reason else "finished", reason)
    finally:
        for _, process, _ in running:
            process.stop()
        for _, process, claim in running:
            process.failure()
            claim.close()


def finished(folder: Path, cell: Config, measure: Collection[str] = ()) -> bool:
    """Whether the folder holds the result of this very cell, with converged measurements of all that is asked."""
    return (folder / RESULT).is_file() and read_config(folder) == cell and measured(folder, measure)


def measured(folder: Path, measure: Collection[str]) -> bool:
    """Whether a run holds converged measurements of all these; moments count only beside eigenvalues."""
    if not measure:
        return True
    return sharpness(folder) is not None and ("moments" not in measure or nonuniformity(folder) is not None)


def sharpness(folder: Path) -> float | None:
    """The largest Hessian eigenvalue of a run; None where it was not measured or cannot be trusted."""
    found = read_sharpness(folder).get("eigenvalues")
    if found is None:
        return None
    trusted = found["which"] == "LA" and found["converged"] and found["complete"] is not False
    return float(found["values"][0]) if trusted else None


def nonuniformity(folder: Path) -> dict[int, float] | None:
    """The s_k of a run's moments by their order k; None where they were not measured or did not converge."""
    found = read_sharpness(folder).get("moments")
    if found is None or found["unit"] != "sample" or not found["converged"]:
        return None
    return {int(k): float(s) for k, s in found["nonuniformity"].items()}


def _merged(folder: Path, cells: Sequence[Config]) -> list[Config]:
    """The cells that the folder records and these, if they belong to the same sweep."""
    known: list[Config] = []
    if (folder / SWEEP).exists():
        known = read_cells(folder)
    elif folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UsageError(f"{folder} must be empty or hold a sweep, but it has no {SWEEP}")
    for old in _kinds(known):
        for new in _kinds(cells):
            if differences := _differences(old, new):
                raise UsageError(f"{folder} holds another sweep ({differences}); choose another folder")
    return list(dict.fromkeys([*known, *cells]))


def _kinds(cells: Sequence[Config]) -> list[Config]:
    """One cell of each kind that `_differences` can tell apart."""
    kinds: dict[Any, Config] = {}
    for cell in cells:
        common = tuple(value for name, value in vars(cell).items() if name not in OWN_OF_CELLS)
        kinds.setdefault((common, cell.base, bool(cell.sparsity)), cell)
    return list(kinds.values())


def _differences(old: Config, new: Config) -> str:
    """What two cells of one sweep must have in common, but do not."""
    own = set(OWN_OF_CELLS)
    if not (old.sparsity and new.sparsity):
        own.add("pruner")
    if old.base != new.base:
        own |= {"lr", "momentum"}
    return "; ".join(
        f"{name} {getattr(old, name)} there, {getattr(new, name)} now"
        for name in old.to_json()
        if name not in own and getattr(old, name) != getattr(new, name)
    )
