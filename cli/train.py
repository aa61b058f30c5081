"""`samlite train`."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.progress import Progress

from samlite.cli.console import facts, metric, print_json, progress, stdout
from samlite.cli.options import (
    MEASURES,
    folder_of,
    json_option,
    named_task,
    own_options,
    process_options,
    read_recipe,
    recipe_options,
    run_options,
    seed_option,
    task_argument,
    track_options,
)

if TYPE_CHECKING:
    from samlite.training.config import Config
    from samlite.training.session import EpochRecord

SHOWN = (  # of a result
    *("metric", "final.test_metric", "final.train_loss", "final.train_metric", "best.test_metric", "best.epoch"),
    *("interpolates", "parameters", "gradient_evaluations", "seconds"),
)


@click.command(short_help="Train one network.")
@task_argument
@own_options
@run_options
@recipe_options
@process_options
@seed_option
@click.option(
    "--measure",
    type=MEASURES,
    default="none",
    show_default=True,
    help="Of the minimum: eigenvalues, moments (of the samples' Hessians), or none.",
)
@track_options
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run; default runs/TASK-OPTIMIZER-wN-sN.")
@click.option("--resume/--no-resume", default=True, help="Continue what is in the folder, or insist on an empty one.")
@json_option
def train(
    task: str,
    model: str | None,
    loss: str | None,
    data: str | None,
    config: Path | None,
    measure: tuple[str, ...],
    out: Path | None,
    resume: bool,
    as_json: bool,
    **choices: Any,
) -> None:
    """Train one network on TASK (default: digits) by the task's recipe and your overrides.

    \b
    Examples:
      samlite train --width 64
      samlite train digits --width 128 --optimizer sam --rho 0.1 --seed 1
      samlite train mnist --data path/to/parquet --epochs 10 --schedule cosine
      samlite train --width 64 --momentum 0 --track 1
      samlite train --model nets:resnet --data nets:splits --width 16 --optimizer sam
      torchrun --nproc-per-node 2 -m samlite.cli train --width 64 --optimizer sam

    Repeat the command to continue a run that was stopped; it ends as if it had never been. `samlite tasks
    TASK` shows the recipe, and the folder of the run holds config.json, metrics.jsonl, checkpoint.pt,
    model.safetensors and result.json. With --track each line of metrics.jsonl has the eigenvalues of the
    training loss's Hessian after that epoch, and track.png shows them beside 2/lr.
    """
    from samlite.training.config import Config

    task, source = named_task(task, model, data, loss)
    settings = Config.of(task, read_recipe(config), data=source, **choices)
    folder = out or folder_of(f"{task}-{settings.name}")
    from samlite import distributed

    click.get_current_context().with_resource(distributed.joined())
    with progress() as bar:
        _train(settings, folder, resume, bar)
        if distributed.rank() > 0:  # the first process speaks for all
            return
        if settings.track:
            draw(settings, folder)
        converged = _measure(settings, folder, measure, bar)
    records = _found(folder)
    if as_json:
        print_json({"folder": str(folder), "config": settings.to_json(), **records})
    else:
        _show(settings, folder, **records)
    if not converged:
        more = " --moments" if "moments" in measure else ""
        raise RuntimeError(f"the measurement did not converge; try: samlite sharpness {folder}{more} --tol 1e-2")


def _train(settings: "Config", folder: Path, resume: bool, bar: Progress) -> None:
    from samlite import tasks, training

    name = tasks.get(settings.task).metric
    work = bar.add_task(f"{settings.name}: loading", total=settings.epochs)
    for record in training.train(settings, folder, resume):
        score = metric(record.validation_metric, name)
        status = f"{settings.name}: loss {record.train_loss:.3g}, validation {score}{_sharpness(record)}"
        bar.update(work, completed=record.epoch, description=status)
    bar.remove_task(work)


def _sharpness(record: "EpochRecord") -> str:
    """What is tracked, the largest eigenvalue beside the threshold of gradient descent."""
    from samlite.training.session import TrackedRecord

    if not isinstance(record, TrackedRecord):
        return ""
    largest = record.eigenvalues[0]
    value = "not converged" if largest is None else f"{largest:.3g}"
    found = {name: value for name, value in (record.measures or {}).items() if value is not None}
    others = "".join(f", {name} {value:.3g}" for name, value in found.items())
    return f", λ {value}{others or f' (2/lr {2 / record.lr:.3g})'}"


def draw(settings: "Config", folder: Path) -> None:
    """The figure of a finished run with tracked eigenvalues, unless it is there; without matplotlib, how to get it."""
    from samlite.report.track import draw_track
    from samlite.training.runs import TRACK, read_records

    path = folder / TRACK
    if path.exists():
        return
    records = read_records(folder, "epoch", "lr", "steps", "eigenvalues")
    try:
        draw_track(records, path, f"{settings.task}, {settings.name}: sharpness along training")
    except ImportError as error:
        click.echo(f"No track.png: {error}; then repeat the command", err=True)


def _measure(settings: "Config", folder: Path, measure: tuple[str, ...], bar: Progress) -> bool:
    """Measure what is asked of a run and not done; return whether it converged."""
    from samlite.training.measurements import is_measured

    if is_measured(folder, measure):
        return True
    import torch

    from samlite.training.measurements import measure_run

    torch.set_num_threads(settings.threads)
    work = bar.add_task(f"{settings.name}: measuring", total=None)

    def show(products: int, error: float) -> None:
        bar.update(work, completed=products, description=f"{settings.name}: measuring, Hessian products")

    measure_run(folder, "moments" in measure, show)
    return is_measured(folder, measure)


def _found(folder: Path) -> dict[str, Any]:
    """What a finished run's folder holds: its result, and its sharpness if measured."""
    from samlite.training.measurements import read_sharpness
    from samlite.training.runs import read_result

    sharpness = read_sharpness(folder)
    return {"result": read_result(folder, *SHOWN), **({"sharpness": sharpness} if sharpness else {})}


def _show(settings: "Config", folder: Path, result: dict[str, Any], sharpness: Any = None) -> None:
    name, final, best = result["metric"], result["final"], result["best"]
    view = facts(f"{settings.task}: {settings.name}")
    view.add_row(
        f"test {name}",
        f"{metric(final['test_metric'], name)} at the end, {metric(best['test_metric'], name)} at epoch "
        f"{best['epoch']}, the best on validation",
    )
    for other, value in final.items():
        if other.startswith("test_") and other not in ("test_loss", "test_metric"):
            view.add_row(other.replace("_", " "), metric(value, other.removeprefix("test_")))
    score = "" if name == "loss" else f", {name} {metric(final['train_metric'], name)}"
    verdict = "interpolates" if result["interpolates"] else "does not interpolate"
    view.add_row("training", f"loss {final['train_loss']:.3g}{score}: {verdict}")
    view.add_row("parameters", f"{result['parameters']:,}")
    view.add_row("cost", f"{result['gradient_evaluations']:,} batch gradients, {result['seconds']:.1f} s")
    for name, row in _sharpness_rows(sharpness or {}):
        view.add_row(name, row)
    view.add_row("folder", str(folder))
    stdout.print(view)


def _sharpness_rows(sharpness: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The measurements of a run, those that it has."""
    if measured := sharpness.get("eigenvalues"):
        error = measured.get("errors", [None])[0]
        spread = "" if error is None else f" ± {error:.1g}"
        yield "sharpness", f"λ_max {measured['values'][0]:.6g}{spread}{_status(measured)}"
    if measured := sharpness.get("moments"):
        orders = measured.get("nonuniformity", {}).items()
        yield "non-uniformity", ", ".join(f"s_{k} {s:.4g}" for k, s in orders if s is not None) + _status(measured)


def _status(measured: dict[str, Any]) -> str:
    return "" if measured["converged"] else ", not converged"
