"""The table of all measures, and how they are taken."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.optim import SGD

from samlite.curvature.edges import sam_edge
from samlite.curvature.measures import norms, perturbed, spaces, steps
from samlite.curvature.measures.point import Point, Value
from samlite.curvature.preconditioner import base_of
from samlite.curvature.results import Measure
from samlite.errors import UsageError, require


@dataclass(frozen=True)
class Row:
    """One measure."""

    run: Callable[[Point], Value]
    meaning: str
    """What its value says, in a line."""
    live: bool = False
    """Whether it is followed along training: it takes no more than some products or batches."""


def sharpness(point: Point) -> Value:
    """lambda_max(H), the largest eigenvalue of the Hessian. The cost of k + 1 eigenvalues."""
    top = point.top
    return Value(float(top.values[0]), float(top.errors[0]), "bound", converged=top.converged)


def preconditioned(point: Point) -> Value:
    """lambda_max(P^-1/2 H P^-1/2) with P the diagonal of the optimizer's last step. About 10 to 30 products.

    Cohen et al., arXiv 2207.14484.
    """
    top = point.preconditioned.eigenvalues(1, tol=point.tol, seed=point.seed)
    return Value(float(top.values[0]), float(top.errors[0]), "bound", top.matvecs, top.converged)


def edge(point: Point) -> Value:
    """The largest eigenvalue at which the optimizer's steps still shrink: see `samlite.edges`. Free."""
    note = "of the preconditioned sharpness" if point.edge.curvature == "preconditioned" else "of the sharpness"
    return Value(point.edge.threshold, note=f"{point.edge.formula}, {note}")


def edge_of_sam(point: Point) -> Value:
    """(|g|/2 rho)(sqrt(1 + 8 rho/(lr |g|)) - 1), beside which the sharpness of SAM's iterates settles.

    Long and Bartlett, "Sharpness-aware minimization and the edge of stability", arXiv 2309.12488. One gradient.
    """
    base = base_of(point.optimizer) if point.optimizer is not None else None
    require(base is None or isinstance(base, SGD), "is known for gradient descent inside SAM")
    return Value(sam_edge(point.lr, point.rho, float(point.gradient.norm())))


MEASURES: dict[str, Row] = {
    "sharpness": Row(sharpness, "largest eigenvalue of the Hessian", live=True),
    "edge": Row(edge, "eigenvalue above which this optimizer is unstable", live=True),
    "preconditioned": Row(preconditioned, "largest eigenvalue as the optimizer's diagonal sees it", live=True),
    "sam-edge": Row(edge_of_sam, "where the sharpness of SAM settles", live=True),
    "batch": Row(
        steps.batch_sharpness, "curvature of batches along their own gradients: 2/lr at SGD's edge", live=True
    ),
    "directional": Row(steps.directional, "curvature along the optimizer's next update", live=True),
    "critical": Row(steps.critical, "2 over the least step along the next update that raises the loss", live=True),
    "alignment": Row(spaces.alignment, "share of the squared gradient in the top eigenvectors", live=True),
    "participation": Row(spaces.participation, "how few weights carry the first eigenvector: 1/p all, 1 a single one"),
    "overlap": Row(spaces.overlap, "how far the top spaces of both checkpoints are the same"),
    "worst": Row(perturbed.worst, "largest rise of the loss within the radius"),
    "worst-adaptive": Row(partial(perturbed.worst, adaptive=True), "the same, each weight's step relative to it"),
    "worst-inf": Row(partial(perturbed.worst, norm="inf"), "largest rise where no weight moves beyond the radius"),
    "worst-inf-adaptive": Row(
        partial(perturbed.worst, norm="inf", adaptive=True), "the same, each weight's step relative to it"
    ),
    "average": Row(perturbed.average, "mean rise of the loss under Gaussian noise of the radius"),
    "average-adaptive": Row(
        partial(perturbed.average, adaptive=True), "mean rise under noise of the radius relative to |w|"
    ),
    "relative-flatness": Row(norms.relative_flatness, "curvature of the last layer, weighted by its weights"),
    "fisher-rao": Row(norms.fisher_rao, "mean squared slope of the samples' losses along the weights"),
    "pac-bayes": Row(norms.pac_bayes, "noise on the weights that costs 0.1 of the accuracy: larger is flatter"),
}


def live() -> list[str]:
    """The measures that can be followed along training."""
    return [name for name, row in MEASURES.items() if row.live]


def names_of(names: str | Iterable[str], known: Iterable[str] = tuple(MEASURES)) -> list[str]:
    """The measures that are asked for, "all" for every known one. Raises UsageError for one that there is not."""
    known = list(known)
    asked = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    found = [name for part in asked for name in (known if part == "all" else [part])]
    for name in found:
        require(name in known, f"measures must be of {', '.join(known)}, or all, got {name!r}")
    require(bool(found), "measures must be named, got none")
    return list(dict.fromkeys(found))


def value_of(name: str, point: Point) -> Value:
    """One measure. Raises UsageError where it does not apply."""
    return MEASURES[name].run(point)


def measures(names: Iterable[str], point: Point, progress: Callable[[str], None] | None = None) -> dict[str, Measure]:
    """Those that do not apply are nan, with the reason in their note. See `Hessian.measures`."""
    result = {}
    for name in names:
        if progress:
            progress(name)
        began, known = time.perf_counter(), "top" in vars(point)
        try:
            found = value_of(name, point)
        except UsageError as error:
            found = Value(math.nan, math.nan, note=str(error))
        if not known and "top" in vars(point):  # the eigenvalues that later ones share
            found = found._replace(matvecs=found.matvecs + point.top.matvecs)
        work: dict[str, Any] = point.hessian.work(time.perf_counter() - began)
        result[name] = Measure(**found._asdict(), meaning=MEASURES[name].meaning, **work)
    return result
