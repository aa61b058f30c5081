"""A sweep: the cells of a grid, several at a time.

A cell is a run in a subfolder, so it resumes where it was stopped, and one that crashes takes nothing else with it.
Each computes with the threads of its config, however many cells run at once, so that results do not depend on that.
"""

import time
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import BaseFileLock

from samlite.errors import UsageError, require
from samlite.files import claimed, locked, write_json
from samlite.sweep.batched import together
from samlite.sweep.engines import Engine, Local, Running
from samlite.sweep.grid import SWEEP, check_one_sweep, read_cells
from samlite.training.config import Config
from samlite.training.measurements import MEASURES, is_measured
from samlite.training.runs import RESULT, read_config

CLAIMS = ".claims"  # a file for each cell that a sweep works on


@dataclass(frozen=True)
class Event:
    """What happened to a cell. "done": an earlier sweep finished it."""

    cell: Config
    state: Literal["done", "started", "finished", "failed"]
    reason: str = ""


def run(
    folder: Path | str,
    cells: Sequence[Config],
    *,
    measure: Collection[str] = (),
    jobs: int = 1,
    engine: Engine | None = None,
    batched: bool | None = False,
) -> Generator[Event, None, None]:
    """Run the cells that are not finished, `jobs` at a time, and yield what happens.

    The cells join those that the folder's sweep.json already records. Closing the iterator stops the
    running ones; they resume when the sweep is repeated. Several processes may run sweeps in one folder: each cell is
    claimed by one of them, and let go when that ends, however it ends.

    Args:
        measure: of `MEASURES`, taken of every minimum that lacks it.
        engine: where cells run; default in processes of this machine.
        batched: train runs of a width together as one batched network, which is a job; None where that is faster.

    Raises:
        UsageError: the folder holds something else, or a sweep with another recipe.
    """
    for name in measure:
        require(name in MEASURES, f"measure must be of {', '.join(MEASURES)}, got {name!r}")
    require(jobs >= 1, f"jobs must be >= 1, got {jobs}")
    folder, engine = Path(folder), engine or Local()
    record(folder, cells)
    unfinished = []
    for cell in cells:
        if finished(folder / cell.name, cell, measure):
            yield Event(cell, "done")
        else:
            unfinished.append(cell)
    waiting = together(unfinished, jobs, batched)
    running: list[tuple[Running, dict[Config, BaseFileLock]]] = []
    try:
        while waiting or running:
            for group in list(waiting):
                if len(running) == jobs:
                    break
                claims = _claims(folder, group)
                if not claims:
                    continue
                waiting.remove(group)
                if rest := tuple(cell for cell in group if cell not in claims):
                    waiting.append(rest)
                for cell in [cell for cell in claims if finished(folder / cell.name, cell, measure)]:
                    claims.pop(cell).release()
                    yield Event(cell, "done")
                if claims:
                    running.append((engine.start(folder, tuple(claims), measure), claims))
                    for cell in claims:
                        yield Event(cell, "started")
            time.sleep(0.02 if running else 0.5)
            for one in [one for one in running if one[0].ended()]:
                running.remove(one)
                process, claims = one
                failures = process.failures()
                for cell, claim in claims.items():
                    claim.release()
                    reason = failures.get(cell.name, "")
                    yield Event(cell, "failed" if reason else "finished", reason)
    finally:
        for process, _ in running:
            process.stop()
        for process, claims in running:
            process.failures()
            for claim in claims.values():
                claim.release()
        engine.close()


def _claims(folder: Path, cells: Sequence[Config]) -> dict[Config, BaseFileLock]:
    """The claims of the cells that no other sweep has claimed, which may yet be killed."""
    claims = {cell: claimed(folder / CLAIMS / cell.name) for cell in cells}
    return {cell: claim for cell, claim in claims.items() if claim}


def finished(folder: Path, cell: Config, measure: Collection[str] = ()) -> bool:
    """Whether the folder holds the result of this very cell, with converged measurements of all that is asked."""
    return (folder / RESULT).is_file() and read_config(folder) == cell and is_measured(folder, measure)


def record(folder: Path, cells: Sequence[Config]) -> None:
    """Add the cells to those that the folder records."""
    _merged(folder, cells)  # before anything is written there
    with locked(folder):
        write_json(folder / SWEEP, {"cells": [cell.to_json() for cell in _merged(folder, cells)]})


def _merged(folder: Path, cells: Sequence[Config]) -> list[Config]:
    """The cells that the folder records and these, if they belong to the same sweep."""
    known: list[Config] = []
    if (folder / SWEEP).exists():
        known = read_cells(folder)
    elif folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UsageError(f"{folder} must be empty or hold a sweep, but it has no {SWEEP}")
    check_one_sweep(known, cells, folder)
    return list(dict.fromkeys([*known, *cells]))
