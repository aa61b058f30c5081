"""Every result of a measurement. Each ends with the work that it took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from torch import Tensor

Value = TypeVar("Value", float, Tensor)
Kind = Literal["exact", "bound", "standard error", "at least"]
Verdict = Literal["stable", "unstable", "undecided", "not a minimum"]


class Result:
    """What all results have."""

    converged: bool
    matvecs: int
    gradient_evaluations: float
    seconds: float

    @property
    def advice(self) -> str:
        """What to try where the result did not converge; empty where it did."""
        return "" if self.converged else "raise tol or max_matvecs, or measure in float64"


@dataclass(frozen=True)
class Eigenvalues(Result):
    """The k eigenvalues asked for, best first, each with a bound on its distance to a true one."""

    values: Tensor
    """The eigenvalues (k,), float64 on the host."""
    errors: Tensor
    """The error bounds (k,): |value - eigenvalue| is at most this."""
    residuals: Tensor
    """The residuals (k,): |H x - value x| of the unit vector x behind each value."""
    vectors: Tensor | None
    """The eigenvectors (p, k) on the parameters' device; None unless asked for."""
    converged: bool
    """Whether every error is at most tol * |value|."""
    complete: bool | None
    """True: checked that none was missed; False: the check did not finish; None: not checked."""
    matvecs: int
    """The number of products H v."""
    gradient_evaluations: float
    """The work, in full gradients of the same time."""
    seconds: float

    @property
    def advice(self) -> str:
        """What to try where not all is as exact as asked, or it is not known whether all were found; else empty."""
        if self.converged and self.complete is False:
            return "raise max_matvecs, or ask for fewer eigenvalues"
        return super().advice


@dataclass(frozen=True)
class Estimate(Result, Generic[Value]):
    """A trace from random probes. value ± 1.96 stderr is its 95 % interval, also where probes are few."""

    value: Value
    """The estimate: a number, or (order,) float64."""
    stderr: Value
    probes: int
    converged: bool
    """Whether the standard error is at most tol * |value|."""
    matvecs: int
    gradient_evaluations: float
    seconds: float


@dataclass(frozen=True)
class Density(Result):
    """The spectral density, smoothed by a Gaussian, with the nodes and weights behind it."""

    grid: Tensor
    """Eigenvalues (points,)."""
    density: Tensor
    """The density there (points,), per unit of eigenvalue; its integral is 1."""
    stderr: Tensor
    """Its standard error (points,): density ± 1.96 stderr covers the smoothed density in 95 % of cases."""
    nodes: Tensor
    """Quadrature nodes (probes, steps): the sum of weights * f(nodes) in a row estimates tr(f(H)) / p."""
    weights: Tensor
    """Quadrature weights (probes, steps), 0 where a Krylov space ended early."""
    width: float
    """The standard deviation of the Gaussian."""
    probes: int
    converged: bool
    """Whether the mean standard error is at most tol times the mean density."""
    matvecs: int
    gradient_evaluations: float
    seconds: float


@dataclass(frozen=True)
class Moments(Result):
    """Sharpness a = lambda_max(H) and the non-uniformity s_k of the per-sample Hessians, k = 2 .. order."""

    sharpness: float
    nonuniformity: dict[int, float]
    """s_k by k; 0 where the power is negative or its error exceeds it."""
    powers: dict[int, float]
    """lambda_max(M_k - H^k) by k, with its sign."""
    errors: dict[int, float]
    """The error bound of that eigenvalue by k; under 1 that of the sharpness."""
    unit: str
    """What each Hessian belongs to: a "sample" or a "batch"."""
    fallback: str | None
    """The operation without a per-sample rule, for which samples were measured one at a time; else None."""
    converged: bool
    matvecs: int
    """The number of products with H and with M_k - H^k."""
    gradient_evaluations: float
    seconds: float


@dataclass(frozen=True)
class Bound:
    """A condition value <= limit that stability implies."""

    value: float
    limit: float

    @property
    def slack(self) -> float:
        """What is left to the limit; negative where the condition fails."""
        return self.limit - self.value


@dataclass(frozen=True)
class Stability(Result):
    """Whether a minimum is linearly stable at a learning rate and radius, and up to which learning rate."""

    verdict: Verdict
    value: float
    """lambda_max of E[(I - lr G_i)^2]: 1 or a little more where the minimum has flat directions."""
    margin: float
    """lambda_max of lr B - 2 A on the range of A: negative where stable."""
    error: float
    """The error bound of the margin."""
    max_lr: float
    """2 / lambda_max of B x = mu A x on the range of A; nan where it is not a minimum."""
    max_lr_error: float
    bounds: dict[str, Bound]
    """Necessary conditions by their formula: the first always, the others where M_k >= H^k."""
    lr: float
    rho: float
    unit: str
    fallback: str | None
    """The operation without a per-sample rule, for which samples were measured one at a time; else None."""
    converged: bool
    matvecs: int
    """The number of products with A, B and their mixtures, with H and with M_k - H^k."""
    gradient_evaluations: float
    seconds: float


@dataclass(frozen=True)
class Sharpness(Result):
    """Worst-, ascent- and average-direction sharpness at one point."""

    worst: float
    """lambda_max(H)."""
    worst_error: float
    ascent: float
    """g^T H g / |g|^2 along the full gradient; nan where it is 0."""
    ascent_samples: float
    """The mean of g_i^T H_i g_i / |g_i|^2 over the samples whose gradient is not 0; else nan."""
    average: float
    """The trace of H."""
    average_stderr: float
    notes: tuple[str, ...]
    """The reasons for values that are nan."""
    converged: bool
    matvecs: int
    gradient_evaluations: float
    seconds: float


@dataclass(frozen=True)
class Footprint:
    """The memory that eigenvalues will take beside the weights, in bytes."""

    basis: int
    """The vectors of Lanczos."""
    products: int
    """What a product takes while it is computed."""
    graphs: int
    """The graphs that are kept from product to product."""

    @property
    def total(self) -> int:
        """All together."""
        return self.basis + self.products + self.graphs

    def __str__(self) -> str:
        parts = [f"{size / 2**30:.1f} GB {what}" for what, size in vars(self).items()]
        return f"about {self.total / 2**30:.1f} GB beside the weights: {', '.join(parts)}"


@dataclass(frozen=True)
class Block:
    """The curvature of one layer: the diagonal block of its own parameters."""

    parameters: int
    eigenvalues: Eigenvalues
    trace: Estimate[float]


@dataclass(frozen=True)
class Measure(Result):
    """One of the measures of sharpness. See `Hessian.measures`."""

    value: float
    """The value; nan where the measure does not apply, and `note` says why."""
    error: float
    """What `kind` says."""
    kind: Kind
    """"exact" to rounding; a "bound" or "standard error" of `error`; "at least" where a search found the value."""
    meaning: str
    note: str
    converged: bool
    matvecs: int
    gradient_evaluations: float
    seconds: float


@dataclass(frozen=True)
class SampleSpectra(Result):
    """The largest eigenvalues of single samples' Hessians."""

    values: Tensor
    """The largest eigenvalue of each sample's own Hessian (samples,), float64 on the host."""
    errors: Tensor
    """The error bounds (samples,)."""
    converged: bool
    """Whether every error is at most tol times the largest value: of fitted samples little but rounding is left."""
    matvecs: int
    gradient_evaluations: float
    seconds: float


@dataclass(frozen=True)
class Surface:
    """The loss along a line, or over a plane, through the weights of a network."""

    axis: Tensor
    """The places (points,) along the direction, and of a plane along both: 0 is the network, 1 the other one."""
    losses: Tensor
    """The mean loss there: (points,), or (points, points) with the first direction in rows."""
    accuracy: Tensor | None
    """The accuracy likewise; None unless asked for."""
    barrier: float | None
    """Of a line to another network: how far the loss rises above the line between both ends."""
    lengths: list[float]
    """The Euclidean length of a step of 1 along each direction."""
