"""`samlite sharpness`."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

from samlite.cli.asked import FIGURES, Asked
from samlite.cli.console import print_json, progress, show_table, stdout, table
from samlite.cli.measures import MEASURES, Settings, check_exact, literature_table, measure_options, tables
from samlite.cli.options import existing, json_option

if TYPE_CHECKING:
    from samlite.curvature.hessian import Hessian
    from samlite.curvature.results import Eigenvalues, Measure
    from samlite.training.measurements import Subject


_LARGE = 10_000_000  # parameters from which on memory is told beforehand
_FIELDS = [field.name for field in fields(Asked) if field.name not in ("source", "measures")]


@click.command(short_help="Measure Hessian eigenvalues at a minimum.")
@click.argument("source", metavar="RUN_OR_CHECKPOINT", callback=existing)
@click.option("--top", type=int, default=5, show_default=True, help="How many eigenvalues.")
@click.option(
    "--which",
    type=click.Choice(["LA", "SA", "LM"]),
    default="LA",
    show_default=True,
    help="The largest, the smallest, or the largest in magnitude.",
)
@click.option("--method", type=click.Choice(["lanczos", "power"]), default="lanczos", show_default=True)
@click.option("--tol", type=float, default=1e-3, show_default=True, help="Relative error of eigenvalues and moments.")
@click.option("--verify/--no-verify", default=True, help="Search for eigenvalues that were missed.")
@measure_options
@click.option(
    "--measures",
    "literature",
    metavar="NAME,...",
    help="Also sharpness as papers measure it: batch, critical, edge, worst and others (see docs/measures.md), or all.",
)
@click.option("--radius", type=float, default=0.05, show_default=True, help="Of --measures worst and average.")
@click.option("--other", metavar="RUN", type=click.Path(path_type=Path), help="The run to overlap with.")
@click.option("--lr", type=float, help="For --stability and --measures; default that of the run.")
@click.option("--rho", type=float, help="For --stability and --measures; default that of the run, else 0 (SGD).")
@click.option(
    "--unit",
    type=click.Choice(["sample", "batch"]),
    default="sample",
    show_default=True,
    help="Of --moments and --stability: steps on single samples, or on the batches of --data.",
)
@click.option(
    "--figure", type=click.Path(path_type=Path), help="Of --density; default density.png in the run's folder."
)
@click.option(
    "--curvature",
    type=click.Choice(["hessian", "ggn"]),
    default="hessian",
    show_default=True,
    help="The Hessian, or its Gauss-Newton part, which has no negative eigenvalues.",
)
@click.option(
    "--products",
    type=click.Choice(["autograd", "finite-difference"]),
    default="autograd",
    show_default=True,
    help="Exact, or by differences of the gradient, for operations without a second derivative.",
)
@click.option("--params", metavar="GLOB", help="Only parameters of this name, such as 'layer3.*'.")
@click.option(
    "--mode",
    type=click.Choice(["eval", "train"]),
    default="eval",
    show_default=True,
    help="Batch norm with running statistics, or with those of the batch.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float64"]),
    help="Default float64 for --moments and --stability, else float32.",
)
@click.option("--device", help="cpu, cuda, cuda:1, mps; default that of the run, else cpu.")
@click.option("--samples", type=int, help="How many samples to measure on; of a run at most 8192 by default.")
@click.option("--memory", metavar="SIZE", help="Bound of the kept graphs, such as 2GB; default half of what is free.")
@click.option(
    "--model",
    metavar="MODEL",
    help="For a checkpoint: pkg.mod:factory that builds its module, timm:NAME,num_classes=10, or hf: for what the "
    "config.json beside it describes.",
)
@click.option("--data", metavar="PKG.MOD:BATCHES", help="For a checkpoint: (inputs, targets), or batches.")
@click.option(
    "--loss",
    metavar="LOSS",
    help="For a checkpoint: cross_entropy (the default), mse, model for its own loss of a dictionary, or pkg.mod:fn "
    "of (model, batch).",
)
@click.option("--weights", metavar="NAME", help="Which weights in a checkpoint that holds several, such as ema.")
@click.option("--save-vectors", type=click.Path(path_type=Path), help="Write the eigenvectors (.safetensors).")
@json_option
def sharpness(source: Path, as_json: bool, **options: Any) -> None:
    """Measure the eigenvalues of the loss Hessian at a minimum: of a run's folder, or of anyone's
    checkpoint (a file of torch.save or safetensors, or a folder of Hugging Face's), from which weights
    are read and nothing is executed.

    \b
    Examples:
      samlite sharpness runs/digits-sgd-w64-s0
      samlite sharpness runs/digits-sgd-w64-s0 --top 1 --which SA --dtype float64
      samlite sharpness runs/digits-sgd-w64-s0 --moments --trace --density --blocks
      samlite sharpness runs/digits-sgd-w64-s0 --stability --curvature ggn
      samlite sharpness runs/digits-sgd-w64-s0 --measures batch,critical,edge
      samlite sharpness resnet.pt --model nets:resnet20 --data nets:batches --top 10
      samlite sharpness gpt2/ --model hf: --data texts:batches --loss model
      torchrun --nproc-per-node 4 -m samlite.cli sharpness runs/digits-sgd-w64-s0 --moments

    Each value comes with a bound on its error, or with a standard error where it is an estimate. Exit status 1
    where a value is not as exact as --tol asks, or where the search for missed eigenvalues did not finish.
    The measurement of a run is kept in its sharpness.json where --tol is 1e-3 or less.
    """
    given = {name: options[name] for name in _FIELDS}
    asked = Asked(source, **given, measures=[name for name in MEASURES if options[name]])
    asked.check()
    from samlite import distributed

    click.get_current_context().with_resource(distributed.joined())
    subject = asked.subject()
    hessian, eigenvalues, more, found = _measure(asked, subject)
    if distributed.rank() > 0:  # the first process speaks for all
        return
    from samlite.training.measurements import as_record, document, keep

    settings = {"mode": asked.mode, "dtype": asked.dtype, "curvature": asked.curvature}
    record = as_record(subject, eigenvalues, asked.which, measured_parameters=hessian.shape[0], **settings)
    record |= {name: document(value) for name, value in more.items()}
    if found:
        record["measures"] = {name: document(value) for name, value in found.items()}
    if "moments" in record:
        record["moments"]["dtype"] = asked.dtype
    if asked.kept:
        keep(source, record)
    if asked.save_vectors is not None:
        _save(asked.save_vectors, eigenvalues)
    drawn = _draw(source, asked.figure, more)
    if as_json:
        print_json({**record, "gradient_evaluations": eigenvalues.gradient_evaluations})
    else:
        _show(source, record, eigenvalues)
        for values in tables(more):
            show_table(values)
        if found:
            show_table(literature_table(found))
        for figure in drawn:
            stdout.print(Text(f"figure: {figure}"))
    _check_exact(eigenvalues, more, asked)


def _measure(asked: Asked, subject: "Subject") -> "tuple[Hessian, Eigenvalues, dict[str, Any], dict[str, Measure]]":
    """The matrix, its eigenvalues, and what else is asked of it, under a bar of products."""
    with progress() as bar:
        work = bar.add_task("measuring", total=None)
        name = "eigenvalues"

        def show(products: int, error: float) -> None:
            bar.update(work, completed=products, description=f"products, {name}; error {error:.2g} of what is allowed")

        hessian = subject.hessian(
            asked.dtype,
            params=asked.params,
            memory=asked.memory,
            mode=asked.mode,
            curvature=asked.curvature,
            products=asked.products,
        )
        if hessian.shape[0] >= _LARGE:
            click.echo(f"memory: {hessian.footprint(asked.top)}", err=True)
        eigenvalues = hessian.eigenvalues(
            asked.top,
            asked.which,
            asked.method,
            tol=asked.tol,
            verify=asked.verify,
            vectors=asked.save_vectors is not None,
            progress=show,
        )
        how = Settings(asked.tol, asked.lr, asked.rho or 0.0, asked.unit, show)
        more = {}
        for name in asked.measures:
            more[name] = MEASURES[name].run(hessian, how)
        found = _found(asked, subject, hessian, lambda name: bar.update(work, description=f"products, {name}"))
    return hessian, eigenvalues, more, found


def _found(
    asked: Asked, subject: "Subject", hessian: "Hessian", progress: Callable[[str], None]
) -> "dict[str, Measure]":
    """The --measures that are asked for."""
    if not asked.named:
        return {}
    options: dict[str, Any] = {"radius": asked.radius, "batch_size": subject.batch_size, "k": asked.top}
    if asked.other is not None:
        from samlite.training.measurements import run_subject

        options["other"] = run_subject(asked.other, asked.samples, asked.device).hessian(asked.dtype)
    optimizer = subject.optimizer
    if optimizer is not None and (asked.lr, asked.rho) != (subject.lr, subject.rho):
        optimizer = None  # another one is asked about
    return hessian.measures(asked.named, optimizer, asked.lr, asked.rho or None, **options, progress=progress)


def _save(path: Path, eigenvalues: "Eigenvalues") -> None:
    from samlite.training.checkpoints import save_tensors

    assert eigenvalues.vectors is not None
    save_tensors(path, {"values": eigenvalues.values, "vectors": eigenvalues.vectors.contiguous().cpu()})


def _draw(source: Path, figure: Path | None, more: dict[str, Any]) -> list[Path]:
    """The figures of what was measured, unless there is no place for them or no matplotlib."""
    from samlite.report.density import draw_density
    from samlite.report.spectra import draw_spectra

    drawn = []
    for name, own, draw in (("density", figure, draw_density), ("spectra", None, draw_spectra)):
        path = own or (source / FIGURES[name] if source.is_dir() else None)
        if more.get(name) is None or path is None:
            continue
        try:
            draw(more[name], path, str(source))
            drawn.append(path)
        except ImportError as error:
            if own:
                raise
            click.echo(f"No {path.name}: {error}", err=True)
    return drawn


def _check_exact(eigenvalues: "Eigenvalues", more: dict[str, Any], asked: Asked) -> None:
    advice = "raise --tol, or measure with --dtype float64" if asked.dtype == "float32" else "raise --tol"
    check_exact(more, asked.tol, advice)
    if not eigenvalues.converged:
        raise RuntimeError(f"not all of the {asked.top} values are as exact as --tol {asked.tol:g} asks; {advice}")
    if eigenvalues.complete is False:
        raise RuntimeError("the search for missed eigenvalues did not finish; ask for fewer with --top")


def _show(source: Path, record: dict[str, Any], eigenvalues: "Eigenvalues") -> None:
    names = {"LA": "largest", "SA": "smallest", "LM": "largest in magnitude"}
    which, matrix = record["eigenvalues"]["which"], {"hessian": "Hessian", "ggn": "Gauss-Newton"}[record["curvature"]]
    view = table(f"{source}: {names[which]} {matrix} eigenvalues", ">", ">eigenvalue", ">error at most")
    pairs = zip(eigenvalues.values.tolist(), eigenvalues.errors.tolist(), strict=True)
    for i, (value, error) in enumerate(pairs, 1):
        view.add_row(str(i), f"{value:.6g}", f"{error:.1g}")
    stdout.print(view)
    complete = {
        True: "none was missed",
        False: "whether one was missed is not known: the search did not finish",
        None: "not searched for missed ones (--verify)",
    }[eigenvalues.complete]
    samples = "all batches" if record["samples"] is None else f"{record['samples']:,} samples"
    if record["samples"] != record["available"]:
        samples += f" of {record['available']:,}"
    work = (
        f"{eigenvalues.matvecs} products, the work of {eigenvalues.gradient_evaluations:.0f} gradients, "
        f"{eigenvalues.seconds:.2f} s"
    )
    stdout.print(
        Text(
            f"{complete}; {record['measured_parameters']:,} parameters, {samples}, {record['mode']} mode, "
            f"{record['dtype']}; {work}"
        )
    )
