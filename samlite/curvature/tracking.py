"""Sharpness followed over a training run: the largest Hessian eigenvalues, and other measures beside them.

The first measurement of eigenvalues starts at random. Later ones are Rayleigh-Ritz on the last eigenvectors, expanded
by residuals until r^2 / gap is small enough. The gap is to what those few vectors show of the spectrum, and the nearest
eigenvalue may not be among it: at a bound of 1e-3, errors of 2e-3 were seen. So values are asked for at 2e-4.

A tracked value is never above the true one of its place, but another eigenvalue may overtake unseen. Two things watch:
- Where it took more than 3 expansions the eigenvectors have turned far, and the measurement starts at random again, as
  do the next ones until eigenvectors stay near those of the last measurement. Several values are verified then.
- Where it did not, one more vector, orthogonal to those followed, takes a step of power iteration (one product). It
  tends to the largest eigenvalue beside them; once its Rayleigh quotient is beyond the k-th value it joins the start.
What overtakes abruptly beside steady eigenvectors may be missed for some measurements: verify the last with
`Hessian.eigenvalues(verify=True)`.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from samlite.curvature.hessian import Hessian
from samlite.curvature.measures.point import Point
from samlite.curvature.measures.table import live, names_of, value_of
from samlite.curvature.operator import Operator
from samlite.curvature.results import Eigenvalues
from samlite.errors import UsageError, require

TOL = 1e-3  # relative error of each value
ASKED = 2e-4  # the bound that is asked for: see above
NEAR = 3  # expansions that eigenvectors which turned little take at most
STEADY = 0.8  # the squared part of eigenvectors in the space of the last ones from which on they turned little
BATCHES = 50  # of batch sharpness in one measurement at most


class Tracker:
    """Follows the k largest eigenvalues of a Hessian whose model is being trained, and other measures.

    ```python
    tracker = samlite.Tracker(hessian, measures="batch,critical,edge", optimizer=optimizer)
    for epoch in range(epochs):
        ...
        print(tracker.measure()["measures"])
    ```

    In memory: k + 1 vectors of the number of parameters p from one measurement to the next, up to 2k + 30 in one, and
    what the `Hessian` keeps: the graphs of the last measurement, within its `memory`, until the next. Another two for
    preconditioned sharpness; and during a measurement a copy of the optimizer for what lies along its next step.

    Args:
        measures: names of `Hessian.measures` that can be followed, such as "batch,critical", or "all" of them.
        optimizer: that trains the model.
        batch_size: that it is trained with.
        lr: learning rate where there is no optimizer.
        rho: SAM's radius where there is no optimizer.

    Raises:
        UsageError: there is no such measure, or it cannot be followed.
    """

    def __init__(
        self,
        hessian: Hessian,
        k: int = 1,
        measures: str | Iterable[str] = (),
        optimizer: Optimizer | None = None,
        *,
        batch_size: int = 128,
        lr: float | None = None,
        rho: float | None = None,
    ) -> None:
        p = hessian.shape[0]
        require(isinstance(k, int) and 1 <= k <= p, f"k must be between 1 and the dimension {p}, got {k}")
        self.hessian, self.k, self.optimizer = hessian, k, optimizer
        self.names = followed(measures)
        self.batch_size, self.lr, self.rho = batch_size, lr, rho
        self._hessian, self._preconditioned = Follower(k), Follower(1)
        self._count = 0  # of measurements

    def measure(self) -> dict[str, Any]:
        """What holds at the present weights.

        Returns:
            `eigenvalues`, largest first, None for one not found to 1e-3; the `products` that took. With measures also
            `measures` by name, None for one that does not apply or was not found; and their `errors`, where not 0.
        """
        tracked = self._hessian.measure(self.hessian)
        if not self.names:
            return tracked
        values: dict[str, float | None] = {}
        errors: dict[str, float] = {}
        point = Point(
            self.hessian, self.optimizer, self.lr, self.rho,
            batch_size=self.batch_size, batches=BATCHES, k=self.k, seed=self._count,
        )  # fmt: skip
        self._count += 1
        for name in self.names:
            values[name], error = self._value(name, point, tracked)
            if error:
                errors[name] = error
        return {**tracked, "measures": values, "errors": errors}

    def _value(self, name: str, point: Point, tracked: dict[str, Any]) -> tuple[float | None, float]:
        """A measure and its error; those of eigenvalues are followed like them."""
        try:
            if name == "sharpness":
                return tracked["eigenvalues"][0], 0.0
            if name == "preconditioned":
                found = self._preconditioned.measure(point.preconditioned)
                tracked["products"] += found["products"]
                return found["eigenvalues"][0], 0.0
            if name == "alignment":
                vectors = self._hessian.vectors
                require(vectors is not None, "the eigenvalues were not found")
                assert vectors is not None
                g = point.gradient / point.gradient.norm()
                return float((vectors.T @ g).square().sum()), self._hessian.sine
            value = value_of(name, point)
            return value.value, value.error
        except UsageError:
            return None, 0.0

    def state_dict(self) -> dict[str, Any]:
        """What the next measurement starts from."""
        state = self._hessian.state_dict()
        if self.names:
            state |= {"preconditioned": self._preconditioned.state_dict(), "count": self._count}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave. Raises UsageError where it is of another network or number of values."""
        like, p = self.hessian.params[0], self.hessian.shape[0]
        self._hessian.load_state_dict(state, like, p)
        if self.names:
            self._preconditioned.load_state_dict(state["preconditioned"], like, p)
            self._count = int(state["count"])


def followed(measures: str | Iterable[str]) -> list[str]:
    """The measures of these names, "all" for every one that can be followed. Raises UsageError for another one."""
    return names_of(measures, live()) if measures else []


class Follower:
    """Follows the k largest eigenvalues of a symmetric matrix that changes."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.vectors: Tensor | None = None  # (p, k), the start of the next measurement
        self.outsider: Tensor | None = None  # (p,), the vector of the power iteration
        self.turning = False  # whether eigenvectors turned far at the last measurement
        self.sine = 1.0  # of the angles between the vectors and the true ones, at most

    def measure(self, matrix: Operator) -> dict[str, Any]:
        """`eigenvalues` of the matrix, largest first, None for one not found to 1e-3; `products` it took."""
        before = self.vectors
        if before is None or self.turning:
            result, products = self._afresh(matrix)
        else:
            result, products = self._warm(matrix, before)
        vectors = result.vectors
        if before is not None and vectors is not None:
            self.turning = float((before.T @ vectors).square().sum()) < STEADY * self.k
        # A value is within r^2 / gap, and its vector within r / gap.
        angles = result.errors / result.residuals.clamp_min(torch.finfo(torch.float64).tiny)
        self.sine = min(1.0, float(angles.norm()))
        if result.complete is not False:  # else the next measurement starts as this one did
            self.vectors = vectors
        return {"eigenvalues": _trusted(result), "products": products}

    def _afresh(self, matrix: Operator) -> tuple[Eigenvalues, int]:
        """From a random start. One value that is found so is the largest; several are searched for missed ones."""
        result = self._eigenvalues(matrix, verify=self.k > 1 or self.vectors is None)
        return result, result.matvecs

    def _warm(self, matrix: Operator, start: Tensor) -> tuple[Eigenvalues, int]:
        result = self._eigenvalues(matrix, start=start, verify=False, max_matvecs=self.k + NEAR + 1)
        products, vectors = result.matvecs, result.vectors
        assert vectors is not None
        if products > self.k + NEAR or not result.converged:
            result, more = self._afresh(matrix)
            return result, products + more
        if self.k < len(vectors):
            missed = self._power_step(matrix, vectors, float(result.values[-1]))
            products += 1
            if missed is not None:
                self.outsider = vectors[:, -1]  # whose place it takes
                result = self._eigenvalues(matrix, start=torch.cat([vectors, missed[:, None]], dim=1), verify=False)
                products += result.matvecs
        return result, products

    def state_dict(self) -> dict[str, Any]:
        """What the next measurement starts from."""
        return {"vectors": self.vectors, "outsider": self.outsider, "turning": self.turning}

    def load_state_dict(self, state: dict[str, Any], like: Tensor, p: int) -> None:
        """Take what `state_dict` gave, of vectors (p, k) like this one. Raises UsageError where it does not fit."""
        for name, shape in {"vectors": (p, self.k), "outsider": (p,)}.items():
            tensor = state[name]
            if tensor is not None and (tensor.shape, tensor.dtype) != (shape, like.dtype):
                raise UsageError(f"{name} must be {like.dtype} of shape {shape}, got {tuple(tensor.shape)}")
            setattr(self, name, None if tensor is None else tensor.to(like.device))
        self.turning = bool(state.get("turning"))

    def _eigenvalues(self, matrix: Operator, **options: Any) -> Eigenvalues:
        # The size of the basis is fixed, as the default depends on the free memory, and a resumed run must not.
        p = matrix.shape[0]
        basis = 2 * self.k + min(30, p + 2)
        return matrix.eigenvalues(self.k, tol=ASKED, vectors=True, basis=basis, **options)

    def _power_step(self, matrix: Operator, X: Tensor, last: float) -> Tensor | None:  # noqa: N803
        """A step beside the vectors X (p, k); returns its vector where that shows an eigenvalue beyond the last one."""
        v = self.outsider
        if v is None:
            generator = torch.Generator(device="cpu").manual_seed(0)
            v = torch.randn(len(X), generator=generator, dtype=torch.float32, device="cpu").to(X)
        for _ in range(2):  # twice is enough for orthogonality to rounding
            v = v - X @ (X.T @ v)
            v = v / v.norm()
        w = matrix @ v
        # Over a power of two, as the squares of a large or small product overflow or underflow.
        self.outsider = w * 2.0 ** -math.frexp(float(w.abs().max()))[1] if w.any() else v
        return v if float(v @ w) > last + TOL * abs(last) else None


def _trusted(result: Eigenvalues) -> list[float | None]:
    if result.complete is False:
        return [None] * len(result.values)
    within = result.errors <= TOL * result.values.abs()
    return [value if result.converged or ok else None for value, ok in zip(result.values.tolist(), within, strict=True)]
