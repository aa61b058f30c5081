"""`samlite surface`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

from samlite.cli.console import facts, print_json, progress, stdout
from samlite.cli.options import existing, json_option
from samlite.errors import UsageError
from samlite.files import replaceable

if TYPE_CHECKING:
    from samlite.curvature.results import Surface

FIGURE = "surface.png"  # in the run's folder


@click.command(short_help="Draw the loss along a line, or over a plane.")
@click.argument("run", metavar="RUN", callback=existing)
@click.option(
    "--along",
    default="random",
    show_default=True,
    metavar="random|eigenvectors|RUN2",
    help="A filter-normalised random direction, the first eigenvector, or towards another run of the network.",
)
@click.option("--plane", is_flag=True, help="Over a second direction of the kind, too.")
@click.option("--points", type=int, help="Along each direction; default 41, of a plane 21.")
@click.option("--radius", type=float, help="How far to both sides; default 1, along eigenvectors sqrt(2/λ₁).")
@click.option("--seed", type=int, default=0, show_default=True, help="Of random directions.")
@click.option("--samples", type=int, help="How many training samples; default at most 8192.")
@click.option("--device", help="cpu, cuda, cuda:1, mps; default that of the run.")
@click.option("--figure", type=click.Path(path_type=Path), help="Default surface.png in the run's folder.")
@json_option
def surface(run: Path, along: str, figure: Path | None, samples: int | None, as_json: bool, **options: Any) -> None:
    """Draw the training loss of a run around its minimum, or on the way to another run's.

    \b
    Examples:
      samlite surface runs/digits-sgd-w64-s0
      samlite surface runs/digits-sgd-w64-s0 --along eigenvectors --plane
      samlite surface runs/digits-sgd-w64-s0 --along runs/digits-sam-rho0.05-w64-s0

    Between two runs the barrier is how far the loss rises above the straight line of its two ends. Statistics of batch
    norm are computed anew at every point there.
    """
    device = options.pop("device")
    path = figure or run / FIGURE
    if figure is not None and not figure.parent.is_dir():
        raise UsageError(f"--figure must be in a folder that exists, got {figure}; make {figure.parent}")
    replaceable(path)
    if samples is not None and samples < 1:
        raise UsageError(f"--samples must be >= 1, got {samples}")
    found = _surface(run, along, samples, device, options)
    drawn = _draw(found, path, run, along, required=figure is not None)
    if as_json:
        from samlite.training.measurements import document

        print_json({"run": str(run), "along": along, **document(found), "figure": str(path) if drawn else None})
    else:
        _show(found, run, along, path if drawn else None)


def _surface(run: Path, along: str, samples: int | None, device: str | None, options: dict[str, Any]) -> "Surface":
    from samlite.curvature.surfaces import surface
    from samlite.training.measurements import run_subject

    with progress() as bar:
        work = bar.add_task("loading", total=None)

        def show(done: int, of: int) -> None:
            bar.update(work, completed=done, total=of, description="points of the surface")

        subject = run_subject(run, samples, device)
        target: Any = along if along in ("random", "eigenvectors") else _other(Path(along), device)
        return surface(subject.hessian(), target, metric=subject.classes, progress=show, **options)


def _other(run: Path, device: str | None) -> Any:
    from samlite.training.runs import load_run

    if not run.is_dir():
        raise UsageError(f"--along must be random, eigenvectors or the folder of a run, got {run}")
    return load_run(run, device).model


def _draw(found: "Surface", path: Path, run: Path, along: str, required: bool) -> bool:
    from samlite.report.surface import draw_surface

    names = {
        "random": ("random direction, in units of the filters' norms", "second random direction"),
        "eigenvectors": ("first eigenvector", "second eigenvector"),
    }
    labels = names.get(along, (f"0: {run.name}, 1: {Path(along).name}", "random direction"))
    try:
        draw_surface(found, path, f"{run.name}: training loss", labels)
    except ImportError as error:
        if required:
            raise
        click.echo(f"No {path.name}: {error}", err=True)
        return False
    return True


def _show(found: "Surface", run: Path, along: str, path: Path | None) -> None:
    view = facts(f"{run}: loss along {along}")
    center = found.losses[found.axis.abs().argmin()]
    center = center if center.dim() == 0 else center[found.axis.abs().argmin()]
    view.add_row("loss here", f"{float(center):.4g}")
    view.add_row("over all points", f"{float(found.losses.min()):.4g} to {float(found.losses.max()):.4g}")
    if found.barrier is not None:
        view.add_row("loss there", f"{float(found.losses[found.axis.eq(1)]):.4g}")
        view.add_row("barrier", f"{found.barrier:.4g} above the line between both")
    view.add_row("a step of 1", " and ".join(f"{length:.4g}" for length in found.lengths) + " long")
    stdout.print(view)
    if path:
        stdout.print(Text(f"figure: {path}"))
