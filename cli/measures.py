"""What `samlite sharpness` measures beside eigenvalues: one row of `MEASURES` each, with its option and its lines."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import click

from samlite.report.table import Table

if TYPE_CHECKING:
    from samlite.curvature.hessian import Hessian
    from samlite.curvature.results import Block, Density, Measure, Moments, Result, SampleSpectra, Stability

Row = tuple[str, str, str, str]
"""Name, value, ±, meaning."""


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    tol: float
    lr: float | None
    rho: float
    unit: Literal["sample", "batch"]
    progress: Callable[[int, float], None]


@dataclass(frozen=True)
class Flag:
    """One option of the command."""

    help: str
    run: Callable[["Hessian", Settings], Any]
    rows: Callable[[Any], Iterable[Row]] = lambda value: ()
    parts: Callable[[Any], "Mapping[str, Result]"] | None = None
    """The results in the value by their names, where it is not one result."""
    to_tol: bool = False
    """Whether --tol says how exact it must be; else it is 5 %."""

    def results(self, name: str, value: Any) -> "Mapping[str, Result]":
        return self.parts(value) if self.parts else {name: value}


def measure_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """A flag for every measure."""
    for name, measure in reversed(MEASURES.items()):
        command = click.option(f"--{name}", is_flag=True, help=measure.help)(command)
    return command


def check_exact(values: Mapping[str, Any], tol: float, advice: str) -> None:
    """Raise RuntimeError where a value is not as exact as asked."""
    rough = []
    for name, value in values.items():
        measure = MEASURES[name]
        inexact = [part for part, result in measure.results(name, value).items() if not result.converged]
        if inexact and measure.to_tol:
            raise RuntimeError(f"the {name} are not as exact as --tol {tol:g} asks; {advice}")
        rough += inexact
    if rough:
        raise RuntimeError(f"products ran out before these were exact to 5 %: {', '.join(rough)}")


def tables(values: Mapping[str, Any]) -> Iterator[Table]:
    """What was measured, a line each, and the layers in a table of their own."""
    rows = [row for name, value in values.items() for row in MEASURES[name].rows(value)]
    if rows:
        columns = ("", ">value", ">±", "meaning")
        yield Table("more about this minimum", columns, rows, notes=["; ".join(_notes(values))])
    if "blocks" in values:
        yield _blocks_table(values["blocks"])


def _notes(values: Mapping[str, Any]) -> Iterator[str]:
    results = {
        part: result
        for name, value in values.items()
        if name != "blocks"
        for part, result in MEASURES[name].results(name, value).items()
    }
    products = sum(result.matvecs for result in results.values())
    yield f"{products} more products, {sum(result.seconds for result in results.values()):.2f} s"
    for operation in {getattr(result, "fallback", None) for result in results.values()} - {None}:
        yield f"no rule for {operation}: one sample at a time"
    if "stability" in values and values["stability"].verdict == "not a minimum":
        yield "negative curvature: measure stability with --curvature ggn"
    if "trace" in values:
        yield from values["trace"]["sharpness"].notes
        yield "± of trace, norm and density: 95 % interval"
        yield from (f"{name} not to 5 %" for name, result in values["trace"].items() if not result.converged)


def literature_table(found: "Mapping[str, Measure]") -> Table:
    """The measures that apply, a line each, and below why the others do not."""
    kinds = {"exact": "", "bound": "bound", "standard error": "std. error", "at least": "at least"}
    rows, notes = [], []
    for name, one in found.items():
        if math.isnan(one.value):
            notes.append(f"{name}: {one.note}")
            continue
        error = f"{one.error:.1g}" if one.error and not math.isnan(one.error) else ""
        about = f"{one.meaning} ({one.note})" if one.note else one.meaning
        cost = f"{one.gradient_evaluations:.0f}"
        rows.append([name, f"{one.value:.4g}", error, kinds[one.kind], cost, about])
    columns = ("measure", ">value", ">±", "", ">gradients", "meaning")
    title = "sharpness as the literature measures it"
    narrow = Table(title, columns[:4], [row[:4] for row in rows], notes=notes)
    return Table(title, columns, rows, notes=notes, narrow=narrow)


# --- Each measure


def _moments_rows(moments: "Moments") -> Iterator[Row]:
    yield (
        "a",
        f"{moments.sharpness:.6g}",
        f"{moments.errors[1]:.1g}",
        "sharpness: largest eigenvalue of the mean Hessian",
    )
    for k, value in moments.nonuniformity.items():
        nth = {2: "2nd", 3: "3rd"}.get(k, f"{k}th")
        error = f"{moments.errors[k] / (k * value ** (k - 1)):.1g}" if value else ""
        meaning = f"how much the Hessians of each {moments.unit} differ, by their {nth} powers"
        yield f"s_{k}", f"{value:.6g}", error, meaning


def _stability_rows(stability: "Stability") -> Iterator[Row]:
    method = f"SAM of rho {stability.rho:g}" if stability.rho else "SGD"
    yield stability.verdict, f"lr {stability.lr:g}", "", f"whether {method}, one {stability.unit} a step, stays here"
    if not math.isnan(stability.max_lr):
        yield "max lr", f"{stability.max_lr:.6g}", f"{stability.max_lr_error:.1g}", "the largest stable learning rate"
    yield "margin", f"{stability.margin:.4g}", f"{stability.error:.1g}", "negative: deviations shrink in mean square"
    for formula, bound in stability.bounds.items():
        meaning = "always needed" if "a (" in formula else "needed where every M_k >= H^k"
        yield formula, f"{bound.value:.4g}", "", f"{meaning}: at most {bound.limit:.4g}, slack {bound.slack:.4g}"


def _trace(hessian: "Hessian", settings: Settings) -> dict[str, Any]:
    return {
        "sharpness": hessian.sharpness(progress=settings.progress),
        "frobenius": hessian.frobenius(progress=settings.progress),
    }


def _trace_rows(values: Mapping[str, Any]) -> Iterator[Row]:
    sharpness, frobenius = values["sharpness"], values["frobenius"]
    yield "trace", f"{sharpness.average:.4g}", f"{1.96 * sharpness.average_stderr:.1g}", "sum of all eigenvalues"
    yield "Frobenius", f"{frobenius.value:.4g}", f"{1.96 * frobenius.stderr:.1g}", "root of the sum of their squares"
    yield "ascent", f"{sharpness.ascent:.4g}", "", "curvature along the gradient"
    yield "ascent, samples", f"{sharpness.ascent_samples:.4g}", "", "mean over samples, along the gradient of each"


def _density_rows(density: "Density") -> Iterator[Row]:
    weights, nodes = density.weights, density.nodes
    shares = (
        ("below 0", nodes < -density.width),
        ("near 0", nodes.abs() <= density.width),
        ("above 0", nodes > density.width),
    )
    for name, inside in shares:
        each = (weights * inside).sum(1)
        spread = 1.96 * float(each.std()) / density.probes**0.5
        meaning = f"share of all eigenvalues; 0 to within {density.width:.2g}"
        yield name, f"{100 * float(each.mean()):.2f} %", f"{100 * spread:.1g}", meaning


def _spectra_rows(spectra: "SampleSpectra") -> Iterator[Row]:
    values = spectra.values
    for name, share in (("median sample", 0.5), ("95 % of samples", 0.95), ("largest sample", 1.0)):
        which = int(round(share * (len(values) - 1)))
        value, place = values.sort().values[which], values.argsort()[which]
        meaning = f"largest eigenvalue of a sample's own Hessian, of {len(values)}"
        yield name, f"{float(value):.4g}", f"{float(spectra.errors[place]):.1g}", meaning


def _blocks_parts(blocks: "Mapping[str, Block]") -> "dict[str, Result]":
    traces = {f"trace of {layer}": block.trace for layer, block in blocks.items()}
    return {**traces, **{f"largest eigenvalue of {layer}": block.eigenvalues for layer, block in blocks.items()}}


def _blocks_table(blocks: "Mapping[str, Block]") -> Table:
    rows = []
    for name, block in blocks.items():
        values, trace = block.eigenvalues, block.trace
        largest = [f"{float(values.values[0]):.4g}", f"{float(values.errors[0]):.1g}"]
        rows.append([name, f"{block.parameters:,}", *largest, f"{trace.value:.4g}", f"{1.96 * trace.stderr:.1g}"])
    return Table("layer by layer", ("layer", ">parameters", ">λ_max", ">error", ">trace", ">±"), rows)


MEASURES = {
    "moments": Flag(
        "Also the non-uniformity s_2, s_3, s_4 of the samples' Hessians.",
        lambda hessian, how: hessian.moments(unit=how.unit, tol=how.tol, progress=how.progress),
        _moments_rows,
        to_tol=True,
    ),
    "stability": Flag(
        "Also whether SGD or SAM of --lr and --rho stays at this minimum.",
        lambda hessian, how: hessian.stability(how.lr or 0, how.rho, how.unit, tol=how.tol, progress=how.progress),
        _stability_rows,
        to_tol=True,
    ),
    "trace": Flag(
        "Also the trace, the Frobenius norm and the sharpness along the gradient.",
        _trace,
        _trace_rows,
        parts=lambda values: values,
    ),
    "density": Flag(
        "Also the spectral density, as a figure.",
        lambda hessian, how: hessian.density(progress=how.progress),
        _density_rows,
    ),
    "spectra": Flag(
        "Also the largest eigenvalues of single samples' Hessians, as a figure.",
        lambda hessian, how: hessian.sample_eigenvalues(progress=how.progress),
        _spectra_rows,
    ),
    "blocks": Flag(
        "Also the largest eigenvalue and the trace of every layer.",
        lambda hessian, how: hessian.blocks(progress=how.progress),
        parts=_blocks_parts,
    ),
}
