"""`samlite sweep`."""

import os
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from samlite.cli import options
from samlite.cli.console import progress
from samlite.cli.options import (
    folder_of,
    json_option,
    named_task,
    own_options,
    read_recipe,
    recipe_options,
    task_argument,
)
from samlite.cli.report import present
from samlite.cli.train import draw
from samlite.errors import UsageError, shortened
from samlite.training.options import OPTIMIZERS, OPTIONS

if TYPE_CHECKING:
    from samlite.sweep.engines import Engine
    from samlite.training.config import Config


@click.command(short_help="Train and measure a grid of runs, and report.")
@task_argument
@own_options
@click.option("--widths", type=options.INTEGERS, required=True, help="Widths of the first layer.")
@click.option(
    "--optimizers",
    type=options.CommaList("name", OPTIMIZERS),
    help=f"Of {', '.join(OPTIMIZERS)}; default the task's baseline and sam.",
)
@click.option("--seeds", type=int, default=3, show_default=True, help="How many, counted from 0.")
@click.option(
    "--rhos",
    "--rho",
    type=options.RADII,
    help="SAM's radii; the best on validation is reported at each width. auto: 0.01 to 0.2, and on past an end until "
    "the best is inside.",
)
@click.option(
    "--label-noises",
    "--label-noise",
    type=options.NUMBERS,
    help="Fractions of the training labels.",
)
@click.option("--train-samples", type=options.INTEGERS, help="How many of the training samples, drawn by the seed.")
@click.option(
    "--sparsities",
    "--sparsity",
    type=options.NUMBERS,
    help="Fractions of the weights masked.",
)
@click.option("--weight-decays", type=options.NUMBERS, help="To compare, such as 0,5e-4.")
@click.option(
    "--measure",
    type=options.MEASURES,
    default="eigenvalues",
    show_default=True,
    help="Of every minimum: eigenvalues, moments (of the samples' Hessians), or none.",
)
@options.track_options
@click.option(
    "--batched/--no-batched",
    default=None,
    help="Train the runs of a width together, as one batched network; default where that is faster: small MLPs.",
)
@click.option("--jobs", type=int, help="Runs at once; default as many as the cores allow, or one a GPU.")
@click.option(
    "--engine",
    type=click.Choice(["local", "slurm"]),
    default="local",
    show_default=True,
    help="Processes of this machine, or a job of the cluster for each run.",
)
@click.option("--partition", help="Of slurm.")
@click.option("--gpus", type=int, default=0, show_default=True, help="Of slurm, for each run.")
@click.option("--minutes", type=int, default=60, show_default=True, help="Time limit of a slurm job; it is requeued.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the sweep; default runs/TASK.")
@recipe_options
@json_option
def sweep(
    task: str,
    model: str | None,
    loss: str | None,
    widths: tuple[int, ...],
    optimizers: tuple[str, ...] | None,
    seeds: int,
    rhos: Any,
    label_noises: tuple[float, ...] | None,
    train_samples: tuple[int, ...] | None,
    sparsities: tuple[float, ...] | None,
    weight_decays: tuple[float, ...] | None,
    measure: tuple[str, ...],
    track: int | None,
    track_measures: str | None,
    track_every: int | None,
    batched: bool | None,
    jobs: int | None,
    engine: str,
    partition: str | None,
    gpus: int,
    minutes: int,
    out: Path | None,
    config: Path | None,
    as_json: bool,
    base: str | None,
    data: str | None,
    device: str | None,
    **recipe: Any,
) -> None:
    """Train TASK (default: digits) at every width, with every optimizer and seed, measure the sharpness
    of each minimum, and report.

    \b
    Examples:
      samlite sweep digits --widths 8,32,128
      samlite sweep digits --widths 32,128 --seeds 5 --rhos 0.05,0.1,0.2 --out runs/rhos
      samlite sweep digits --widths 32,128 --rhos auto
      samlite sweep synthetic --widths 192,1920 --optimizers adam,sam --jobs 4
      samlite sweep digits --widths 16,64 --measure eigenvalues,moments
      samlite sweep digits --widths 16,64 --label-noises 0,0.25,0.5
      samlite sweep --model nets:resnet --data nets:splits --widths 8,16,32 --seeds 5

    Repeat the command to continue what was stopped and to retry what failed; what is finished is kept,
    and only what was not measured is measured.
    More widths, seeds, optimizers or rhos extend the same folder. Each run is a folder that the other
    commands take. Several machines may run the same command on one shared folder; with --engine slurm
    each run is a job, which is requeued and resumes when its time is up.
    """
    from samlite import sweep as sweeps
    from samlite.report.radii import START

    task, data = named_task(task, model, data, loss)
    if engine == "local" and (partition or gpus):
        raise UsageError("--partition and --gpus must go with --engine slurm; leave them out")
    if gpus and device is None:
        device = "cuda"  # of the nodes; this one may have none
    overrides, given = read_recipe(config), {name: value for name, value in recipe.items() if value is not None}
    if "settings" in overrides and "settings" in given:
        given["settings"] = {**overrides["settings"], **given["settings"]}
    overrides |= given
    settings = {"base": base, "data": data, "device": device, "track": track}
    settings |= {"track_measures": track_measures, "track_every": track_every}
    conditions = {"label_noises": label_noises, "train_samples": train_samples}
    conditions |= {"sparsities": sparsities, "weight_decays": weight_decays}
    swept: dict[str, Any] = {name: values or () for name, values in conditions.items()}
    search = rhos == "auto"
    radii = START if search else rhos or ()
    cells = sweeps.grid(task, widths, optimizers or (), seeds, radii, **swept, recipe=overrides, **settings)
    _check_taken(given, cells)
    folder = out or folder_of(task)
    if engine == "slurm":
        if batched:
            raise UsageError("--batched must go with --engine local; leave it out")
        batched = False
        where, most = _cluster(folder, partition, gpus, minutes), len(cells)
    else:
        where, most = _this_machine(cells[0])
    how = (measure, most if jobs is None else jobs, where, batched)
    failures = _run(folder, cells, *how)
    if search:
        failures += _search(folder, cells, how)
    if failures < len(cells):
        present(folder, "params", as_json)
    if failures:
        raise RuntimeError(f"{failures} of {len(cells)} runs failed; repeat the command to retry them")


def _search(folder: Path, cells: "list[Config]", how: Any) -> int:
    """Try the next radius wherever the best one is at an end, until none is; return how many runs failed."""
    from samlite.report.outcomes import summarize
    from samlite.report.radii import beyond

    failures = 0
    while more := beyond(summarize(folder), cells):
        cells += more
        click.echo(f"trying rho {', '.join(sorted({f'{cell.rho:g}' for cell in more}))} as well", err=True)
        failures += (new := _run(folder, more, *how))
        if new == len(more):
            break
    return failures


def _cluster(folder: Path, partition: str | None, gpus: int, minutes: int) -> "Engine":
    from samlite.sweep.engines import Cluster

    return Cluster(folder, "slurm", partition, gpus, minutes)


def _this_machine(cell: "Config") -> "tuple[Engine, int]":
    """The engine, and how many runs it has room for: by its cores, or one for each GPU."""
    from samlite.sweep.engines import Local
    from samlite.training.loop import cores

    gpus = _gpus() if cell.device == "cuda" else []
    if cell.device != "cpu":
        return Local(gpus), max(1, len(gpus))
    return Local(gpus), max(1, cores() // cell.threads)


def _check_taken(given: dict[str, Any], cells: "list[Config]") -> None:
    """What is given for some kinds of optimizers must be for one of the sweep."""
    for name in ("momentum", *(name for name, option in OPTIONS.items() if option.in_label)):
        if name in given and not any(getattr(cell, name) == given[name] for cell in cells):
            used = ", ".join(dict.fromkeys(cell.optimizer for cell in cells))
            option = "--no-normalize" if name == "normalize" else f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} must be for one of the optimizers, got {used}; see samlite train --help")


def _gpus() -> list[str]:
    """The GPUs of this machine that may be used, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else list(map(str, range(torch.cuda.device_count())))


def _run(
    folder: Path, cells: "list[Config]", measure: tuple[str, ...], jobs: int, engine: "Engine", batched: bool | None
) -> int:
    """Run the sweep with a bar of its cells; return how many failed."""
    from samlite import sweep as sweeps

    running, failures = [], 0
    how: dict[str, Any] = {"measure": measure, "jobs": jobs, "engine": engine, "batched": batched}
    with progress() as bar, closing(sweeps.run(folder, cells, **how)) as events:
        work = bar.add_task("starting", total=len(cells))
        for event in events:
            if event.state == "started":
                running.append(event.cell.name)
            elif event.state != "done":
                running.remove(event.cell.name)
            if event.state == "finished" and event.cell.track:
                draw(event.cell, folder / event.cell.name)
            if event.state == "failed":
                failures += 1
                bar.console.print(f"{event.cell.name} failed: {event.reason}", soft_wrap=True)
            bar.update(work, advance=event.state != "started", description=shortened(running, 3))
    return failures
