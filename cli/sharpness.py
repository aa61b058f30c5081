"""`samlite sharpness`."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

from samlite.cli.console import print_json, progress, stdout, table
from samlite.cli.options import existing, json_option
from samlite.errors import UsageError
from samlite.files import replaceable

if TYPE_CHECKING:
    from samlite.curvature.hessian import Hessian
    from samlite.training.measurements import Subject

FIGURE = "density.png"  # in a run's folder


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
@click.option("--moments", is_flag=True, help="Also the non-uniformity s_2, s_3, s_4 of the samples' Hessians.")
@click.option("--stability", is_flag=True, help="Also whether SGD or SAM of --lr and --rho stays at this minimum.")
@click.option("--lr", type=float, help="For --stability; default that of the run.")
@click.option("--rho", type=float, help="For --stability; default that of the run, else 0 (SGD).")
@click.option(
    "--unit",
    type=click.Choice(["sample", "batch"]),
    default="sample",
    show_default=True,
    help="Of --moments and --stability: steps on single samples, or on the batches of --data.",
)
@click.option("--trace", is_flag=True, help="Also the trace, the Frobenius norm and the sharpness along the gradient.")
@click.option("--density", is_flag=True, help="Also the spectral density, as a figure.")
@click.option(
    "--figure", type=click.Path(path_type=Path), help="Of --density; default density.png in the run's folder."
)
@click.option("--blocks", is_flag=True, help="Also the largest eigenvalue and the trace of every layer.")
@click.option(
    "--curvature",
    type=click.Choice(["hessian", "ggn"]),
    default="hessian",
    show_default=True,
    help="The Hessian, or its Gauss-Newton part, which has no negative eigenvalues.",
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
@click.option("--model", metavar="PKG.MOD:FACTORY", help="For a checkpoint: what builds its module.")
@click.option("--data", metavar="PKG.MOD:BATCHES", help="For a checkpoint: (inputs, targets), or batches.")
@click.option(
    "--loss",
    metavar="LOSS",
    help="For a checkpoint: cross_entropy (the default), mse, or pkg.mod:fn of (model, batch).",
)
@click.option("--save-vectors", type=click.Path(path_type=Path), help="Write the eigenvectors (.safetensors).")
@json_option
def sharpness(
    source: Path,
    top: int,
    which: Any,
    method: Any,
    tol: float,
    verify: bool,
    lr: float | None,
    rho: float | None,
    unit: str,
    figure: Path | None,
    curvature: str,
    params: str | None,
    mode: str,
    dtype: str | None,
    device: str | None,
    samples: int | None,
    memory: str | None,
    model: str | None,
    data: str | None,
    loss: str | None,
    save_vectors: Path | None,
    as_json: bool,
    **wanted: bool,
) -> None:
    """Measure the eigenvalues of the loss Hessian at a minimum: of a run's folder, or of anyone's
    checkpoint (.pt, .pth, .safetensors), from which weights are read and nothing is executed.

    \b
    Examples:
      samlite sharpness runs/digits-sgd-w64-s0
      samlite sharpness runs/digits-sgd-w64-s0 --top 1 --which SA --dtype float64
      samlite sharpness runs/digits-sgd-w64-s0 --moments --trace --density --blocks
      samlite sharpness runs/digits-sgd-w64-s0 --stability --curvature ggn
      samlite sharpness resnet.pt --model nets:resnet20 --data nets:batches --top 10
      torchrun --nproc-per-node 4 -m samlite.cli sharpness runs/digits-sgd-w64-s0 --moments

    Each value comes with a bound on its error, or with a standard error where it is an estimate. Exit status 1
    where a value is not as exact as --tol asks, or where the search for missed eigenvalues did not finish.
    The measurement of a run is kept in its sharpness.json where --tol is 1e-3 or less.
    """
    _check_options(source, samples, lr, rho, figure, wanted, {"--model": model, "--data": data, "--loss": loss})
    _check_files(source, figure, save_vectors)
    from samlite import distributed

    click.get_current_context().with_resource(distributed.joined())
    subject = _subject(source, samples, device, model, data, loss)
    lr, rho = lr if lr is not None else subject.lr, rho if rho is not None else subject.rho
    if wanted["stability"] and lr is None:
        raise UsageError("--stability of a checkpoint needs --lr, got none; give the learning rate of its training")
    precise = wanted["moments"] or wanted["stability"]
    dtype = dtype or ("float64" if precise and device != "mps" else "float32")
    settings = {"mode": mode, "dtype": dtype, "curvature": curvature}

    with progress() as bar:
        work = bar.add_task("measuring", total=None)
        name = "eigenvalues"

        def show(products: int, error: float) -> None:
            bar.update(work, completed=products, description=f"products, {name}; error {error:.2g} of what is allowed")

        hessian = subject.hessian(dtype, params=params, memory=memory, mode=mode, curvature=curvature)
        found = hessian.eigenvalues(
            top, which, method, tol=tol, verify=verify, vectors=save_vectors is not None, progress=show
        )
        more: dict[str, Any] = {}
        for name, measure in _measurements(hessian, tol, lr, rho, unit, show):
            if wanted[name]:
                more[name] = measure()

    if distributed.rank() > 0:  # the first process speaks for all
        return
    from samlite.training.measurements import as_record, document, keep

    record = as_record(subject, found, which, measured_parameters=hessian.shape[0], **settings)
    record |= {name: document(value) for name, value in more.items()}
    if "moments" in record:
        record["moments"]["dtype"] = dtype
    whole = which == "LA" and params is None and samples is None and mode == "eval"
    if source.is_dir() and whole and tol <= 1e-3:
        keep(source, record)
    if save_vectors is not None:
        _save(save_vectors, found)
    drawn = _draw(source, figure, more.get("density"))
    if as_json:
        print_json({**record, "gradient_evaluations": found.gradient_evaluations})
    else:
        _show(source, record, found, more, drawn)
    _check_results(found, more, top, tol, dtype)


def _check_options(
    source: Path,
    samples: int | None,
    lr: float | None,
    rho: float | None,
    figure: Path | None,
    wanted: dict[str, bool],
    checkpoint: dict[str, str | None],
) -> None:
    if samples is not None and samples < 1:
        raise UsageError(f"--samples must be >= 1, got {samples}")
    for name, value, needed in (
        ("--lr", lr, "stability"),
        ("--rho", rho, "stability"),
        ("--figure", figure, "density"),
    ):
        if value is not None and not wanted[needed]:
            raise UsageError(f"{name} must go with --{needed}, got {value}; leave it out, or add --{needed}")
    if lr is not None and not 0 < lr < math.inf:
        raise UsageError(f"--lr must be > 0, got {lr}")
    if rho is not None and not 0 <= rho < math.inf:
        raise UsageError(f"--rho must be >= 0, got {rho}")
    given = [name for name, value in checkpoint.items() if value]
    if source.is_dir() and given:
        raise UsageError(f"{given[0]} must go with a checkpoint file, got the folder {source}; leave it out")
    if not source.is_dir() and not {"--model", "--data"} <= set(given):
        raise UsageError(
            f"a checkpoint needs --model pkg.mod:factory and --data pkg.mod:batches, got the file {source}"
        )


def _check_files(source: Path, figure: Path | None, vectors: Path | None) -> None:
    """Before the work, not after it."""
    from samlite.training.measurements import read_sharpness

    if source.is_dir():
        read_sharpness(source)
        replaceable(source / FIGURE)
    for name, path in (("--figure", figure), ("--save-vectors", vectors)):
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"{name} must be in a folder that exists, got {path}; make {path.parent}")
        if path is not None:
            replaceable(path)
    if figure is not None and figure.suffix not in (".png", ".pdf", ".svg", ".jpg"):
        raise UsageError(f"--figure must end in .png, .pdf, .svg or .jpg, got {figure}")


def _subject(
    source: Path, samples: int | None, device: str | None, model: str | None, data: str | None, loss: str | None
) -> "Subject":
    from samlite.training.measurements import checkpoint_subject, run_subject

    if source.is_dir():
        return run_subject(source, samples, device)
    assert model and data
    return checkpoint_subject(source, model, data, loss or "cross_entropy", samples, device)


def _measurements(
    hessian: "Hessian", tol: float, lr: float | None, rho: float, unit: Any, show: Callable[[int, float], None]
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What may be measured beside the eigenvalues, by the name of its option."""
    yield "moments", lambda: hessian.moments(unit=unit, tol=tol, progress=show)
    yield "stability", lambda: hessian.stability(lr or 0, rho, unit, tol=tol, progress=show)
    yield (
        "trace",
        lambda: {"sharpness": hessian.sharpness(progress=show), "frobenius": hessian.frobenius(progress=show)},
    )
    yield "density", lambda: hessian.density(progress=show)
    yield "blocks", lambda: hessian.blocks(progress=show)


def _save(path: Path, found: Any) -> None:
    from samlite.training.checkpoints import save_tensors

    save_tensors(path, {"values": found.values, "vectors": found.vectors.contiguous().cpu()})


def _draw(source: Path, figure: Path | None, density: Any) -> Path | None:
    """The figure of the density, unless there is no place for it or no matplotlib."""
    path = figure or (source / FIGURE if source.is_dir() else None)
    if density is None or path is None:
        return None
    from samlite.report.density import draw_density

    try:
        draw_density(density, path, str(source))
    except ImportError as error:
        if figure:
            raise
        click.echo(f"No {path.name}: {error}", err=True)
        return None
    return path


def _check_results(found: Any, more: dict[str, Any], top: int, tol: float, dtype: str) -> None:
    advice = "raise --tol, or measure with --dtype float64" if dtype == "float32" else "raise --tol"
    for name in ("moments", "stability"):
        if name in more and not more[name].converged:
            raise RuntimeError(f"the {name} are not as exact as --tol {tol:g} asks; {advice}")
    estimates = dict(more.get("trace", {}), **{"density": more["density"]} if "density" in more else {})
    for layer, block in more.get("blocks", {}).items():
        estimates |= {f"trace of {layer}": block.trace, f"largest eigenvalue of {layer}": block.eigenvalues}
    rough = [name for name, estimate in estimates.items() if not estimate.converged]
    if rough:
        raise RuntimeError(f"products ran out before these were exact to 5 %: {', '.join(rough)}")
    if not found.converged:
        raise RuntimeError(f"not all of the {top} values are as exact as --tol {tol:g} asks; {advice}")
    if found.complete is False:
        raise RuntimeError("the search for missed eigenvalues did not finish; ask for fewer with --top")


# --- On screen


def _show(source: Path, record: dict[str, Any], found: Any, more: dict[str, Any], drawn: Path | None) -> None:
    names = {"LA": "largest", "SA": "smallest", "LM": "largest in magnitude"}
    which, matrix = record["eigenvalues"]["which"], {"hessian": "Hessian", "ggn": "Gauss-Newton"}[record["curvature"]]
    view = table(f"{source}: {names[which]} {matrix} eigenvalues", ">", ">eigenvalue", ">error at most")
    for i, (value, error) in enumerate(zip(found.values.tolist(), found.errors.tolist(), strict=True), 1):
        view.add_row(str(i), f"{value:.6g}", f"{error:.1g}")
    stdout.print(view)
    complete = {
        True: "none was missed",
        False: "whether one was missed is not known: the search did not finish",
        None: "not searched for missed ones (--verify)",
    }[found.complete]
    samples = "all batches" if record["samples"] is None else f"{record['samples']:,} samples"
    if record["samples"] != record["available"]:
        samples += f" of {record['available']:,}"
    stdout.print(
        Text(
            f"{complete}; {record['measured_parameters']:,} parameters, {samples}, {record['mode']} mode, "
            f"{record['dtype']}; {_work(found)}"
        )
    )
    rows = [row for name, rows in _ROWS.items() if name in more for row in rows(more[name])]
    if rows:
        view = table("more about this minimum", "", ">value", ">±", "meaning")
        for row in rows:
            view.add_row(*row)
        stdout.print(view)
        stdout.print(Text(_notes(more)))
    if "blocks" in more:
        _show_blocks(more["blocks"])
    if drawn:
        stdout.print(Text(f"figure: {drawn}"))


def _work(found: Any) -> str:
    return f"{found.matvecs} products, the work of {found.gradient_evaluations:.0f} gradients, {found.seconds:.2f} s"


def _moments_rows(found: Any) -> Iterator[tuple[str, str, str, str]]:
    yield "a", f"{found.sharpness:.6g}", f"{found.errors[1]:.1g}", "sharpness: largest eigenvalue of the mean Hessian"
    for k, value in found.nonuniformity.items():
        nth = {2: "2nd", 3: "3rd"}.get(k, f"{k}th")
        error = f"{found.errors[k] / (k * value ** (k - 1)):.1g}" if value else ""
        yield (
            f"s_{k}",
            f"{value:.6g}",
            error,
            f"how much the Hessians of each {found.unit} differ, by their {nth} powers",
        )


def _stability_rows(found: Any) -> Iterator[tuple[str, str, str, str]]:
    method = f"SAM of rho {found.rho:g}" if found.rho else "SGD"
    yield found.verdict, f"lr {found.lr:g}", "", f"whether {method}, one {found.unit} a step, stays here"
    if not math.isnan(found.max_lr):
        yield "max lr", f"{found.max_lr:.6g}", f"{found.max_lr_error:.1g}", "the largest stable learning rate"
    yield "margin", f"{found.margin:.4g}", f"{found.error:.1g}", "negative: deviations shrink in mean square"
    for formula, bound in found.bounds.items():
        meaning = "always needed" if "a (" in formula else "needed where every M_k >= H^k"
        yield formula, f"{bound.value:.4g}", "", f"{meaning}: at most {bound.limit:.4g}, slack {bound.slack:.4g}"


def _trace_rows(found: Any) -> Iterator[tuple[str, str, str, str]]:
    sharpness, frobenius = found["sharpness"], found["frobenius"]
    yield "trace", f"{sharpness.average:.4g}", f"{1.96 * sharpness.average_stderr:.1g}", "sum of all eigenvalues"
    yield "Frobenius", f"{frobenius.value:.4g}", f"{1.96 * frobenius.stderr:.1g}", "root of the sum of their squares"
    yield "ascent", f"{sharpness.ascent:.4g}", "", "curvature along the gradient"
    yield "ascent, samples", f"{sharpness.ascent_samples:.4g}", "", "mean over samples, along the gradient of each"


def _density_rows(found: Any) -> Iterator[tuple[str, str, str, str]]:
    weights, nodes = found.weights, found.nodes
    shares = (
        ("below 0", nodes < -found.width),
        ("near 0", nodes.abs() <= found.width),
        ("above 0", nodes > found.width),
    )
    for name, inside in shares:
        each = (weights * inside).sum(1)
        spread = 1.96 * float(each.std()) / found.probes**0.5
        meaning = f"share of all eigenvalues; 0 to within {found.width:.2g}"
        yield name, f"{100 * float(each.mean()):.2f} %", f"{100 * spread:.1g}", meaning


_ROWS: dict[str, Callable[[Any], Iterator[tuple[str, str, str, str]]]] = {
    "moments": _moments_rows,
    "stability": _stability_rows,
    "trace": _trace_rows,
    "density": _density_rows,
}


def _notes(more: dict[str, Any]) -> str:
    results = [found for name, found in more.items() if name in ("moments", "stability", "density")]
    if "trace" in more:
        results += more["trace"].values()
    products = sum(found.matvecs for found in results)
    seconds = sum(found.seconds for found in results)
    notes = [f"{products} more products, {seconds:.2f} s"]
    notes += [f"no rule for {op}: one sample at a time" for op in {getattr(r, "fallback", None) for r in results} if op]
    if "stability" in more and more["stability"].verdict == "not a minimum":
        notes.append("negative curvature: measure stability with --curvature ggn")
    if "trace" in more:
        notes += more["trace"]["sharpness"].notes
        notes.append("± of trace, norm and density: 95 % interval")
        notes += [f"{name} not to 5 %" for name, r in more["trace"].items() if not r.converged]
    return "; ".join(notes)


def _show_blocks(blocks: dict[str, Any]) -> None:
    view = table("layer by layer", "layer", ">parameters", ">λ_max", ">error", ">trace", ">±")
    for name, block in blocks.items():
        values, trace = block.eigenvalues, block.trace
        view.add_row(
            name,
            f"{block.parameters:,}",
            f"{float(values.values[0]):.4g}",
            f"{float(values.errors[0]):.1g}",
            f"{trace.value:.4g}",
            f"{1.96 * trace.stderr:.1g}",
        )
    stdout.print(view)
