"""`samlite sharpness`."""

from pathlib import Path
from typing import Any

import click
from rich.text import Text

from samlite.cli.console import print_json, progress, stdout, table
from samlite.cli.options import existing, json_option


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
@click.option("--tol", type=float, default=1e-3, show_default=True, help="Relative error asked for.")
@click.option("--verify/--no-verify", default=True, help="Search for eigenvalues that were missed.")
@click.option("--moments", is_flag=True, help="Also the non-uniformity s_2, s_3, s_4 of the samples' Hessians.")
@click.option("--params", metavar="GLOB", help="Only parameters of this name, such as 'layer3.*'.")
@click.option(
    "--mode",
    type=click.Choice(["eval", "train"]),
    default="eval",
    show_default=True,
    help="Batch norm with running statistics, or with those of the batch.",
)
@click.option("--dtype", type=click.Choice(["float32", "float64"]), default="float32", show_default=True)
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
    moments: bool,
    params: str | None,
    mode: Any,
    dtype: str,
    device: str | None,
    samples: int | None,
    memory: str | None,
    model: str | None,
    data: str | None,
    loss: str | None,
    save_vectors: Path | None,
    as_json: bool,
) -> None:
    """Measure the eigenvalues of the loss Hessian at a minimum: of a run's folder, or of anyone's
    checkpoint (.pt, .pth, .safetensors), from which weights are read and nothing is executed.

    \b
    Examples:
      samlite sharpness runs/digits-sgd-w64-s0
      samlite sharpness runs/digits-sgd-w64-s0 --top 1 --which SA --dtype float64
      samlite sharpness runs/digits-sgd-w64-s0 --moments
      samlite sharpness resnet.pt --model nets:resnet20 --data nets:batches --top 10

    Each value comes with a bound on its error. With --moments: how much the Hessians H_i of single samples
    differ, as s_k = lambda_max(M_k - H^k)^(1/k) with M_k the mean of H_i^k, in the unit of an eigenvalue.
    Exit status 1 where a value is not as exact as --tol asks, or where the search for missed eigenvalues did
    not finish. The measurement of a run is kept in its sharpness.json.
    """
    from samlite.measure import as_record, checkpoint_subject, moments_record, run_subject

    if samples is not None and samples < 1:
        raise ValueError(f"--samples must be >= 1, got {samples}")
    if source.is_dir():
        foreign = [name for name, value in (("--model", model), ("--data", data), ("--loss", loss)) if value]
        if foreign:
            raise ValueError(f"{foreign[0]} must go with a checkpoint file, got the folder {source}; leave it out")
        subject = run_subject(source, samples, device)
    else:
        if not (model and data):
            raise ValueError(
                f"a checkpoint needs --model pkg.mod:factory and --data pkg.mod:batches, got the file {source}"
            )
        subject = checkpoint_subject(source, model, data, loss or "cross_entropy", samples, device)

    with progress() as bar:
        work = bar.add_task("measuring", total=None)

        def show(products: int, error: float) -> None:
            status = f"products H v; error {error:.2g} of what is allowed"
            bar.update(work, completed=products, description=status)

        hessian = subject.hessian(dtype, params=params, memory=memory, mode=mode)
        found = hessian.eigenvalues(
            top, which, method, tol=tol, verify=verify, vectors=save_vectors is not None, progress=show
        )
        spread = hessian.moments(tol=tol, progress=show) if moments else None
    record = as_record(subject, found, which, mode=mode, dtype=dtype, measured_parameters=hessian.shape[0])
    if spread is not None:
        record["moments"] = moments_record(spread)
    if source.is_dir() and which == "LA" and params is None and mode == "eval" and samples is None:
        from samlite.checkpoints import write_json

        write_json(source / "sharpness.json", record)
    if save_vectors is not None:
        _save(save_vectors, found)
    if as_json:
        print_json({**record, "gradient_evaluations": found.gradient_evaluations})
    else:
        _show(source, record, found)
        if spread is not None:
            _show_moments(spread)
    if spread is not None and not spread.converged:
        raise RuntimeError(f"not all moments are as exact as --tol {tol:g} asks; {_advice(dtype)}")
    if not found.converged:
        raise RuntimeError(f"not all of the {top} values are as exact as --tol {tol:g} asks; {_advice(dtype)}")
    if found.complete is False:
        raise RuntimeError("the search for missed eigenvalues did not finish; ask for fewer with --top")


def _advice(dtype: str) -> str:
    return "raise --tol, or measure with --dtype float64" if dtype == "float32" else "raise --tol"


def _save(path: Path, found: Any) -> None:
    from safetensors.torch import save

    from samlite.checkpoints import replacing

    tensors = {"values": found.values, "vectors": found.vectors.contiguous().cpu()}
    with replacing(path) as beside:
        beside.write_bytes(save(tensors))


def _show_moments(found: Any) -> None:
    view = table("how much the Hessians of single samples differ", "", ">value", "meaning")
    view.add_row("a", f"{found.sharpness:.6g}", "sharpness: the largest eigenvalue of their mean")
    for k, value in found.nonuniformity.items():
        nth = {2: "2nd", 3: "3rd"}.get(k, f"{k}th")
        view.add_row(f"s_{k}", f"{value:.6g}", f"spread of their {nth} powers about that of the mean")
    stdout.print(view)
    note = f"; one sample at a time, as there is no rule for {found.fallback}" if found.fallback else ""
    work = f"{found.matvecs} products, the work of {found.gradient_evaluations:.0f} gradients"
    stdout.print(Text(f"{work}, {found.seconds:.2f} s{note}"))


def _show(source: Path, record: dict[str, Any], found: Any) -> None:
    names = {"LA": "largest", "SA": "smallest", "LM": "largest in magnitude"}
    which = record["eigenvalues"]["which"]
    view = table(f"{source}: {names[which]} Hessian eigenvalues", ">", ">eigenvalue", ">error at most")
    for i, (value, error) in enumerate(zip(found.values.tolist(), found.errors.tolist(), strict=True), 1):
        view.add_row(str(i), f"{value:.6g}", f"{error:.1g}")
    stdout.print(view)
    samples = "all batches" if record["samples"] is None else f"{record['samples']:,} samples"
    if record["samples"] != record["available"]:
        samples += f" of {record['available']:,}"
    complete = {
        True: "none was missed",
        False: "whether one was missed is not known: the search did not finish",
        None: "not searched for missed ones (--verify)",
    }[found.complete]
    stdout.print(
        Text(
            f"{complete}; {record['measured_parameters']:,} parameters, {samples}, {record['mode']} mode, "
            f"{record['dtype']}; {found.matvecs} products, the work of {found.gradient_evaluations:.0f} gradients, "
            f"{found.seconds:.2f} s"
        )
    )
