"""The largest Hessian eigenvalues followed over a training run, each measurement starting from the last one's vectors.

The first measurement starts at random and is verified. Later ones are Rayleigh-Ritz on the last eigenvectors, expanded
by residuals until r^2 / gap is small enough. The gap is to what those few vectors show of the spectrum, and the nearest
eigenvalue may not be among it: at a bound of 1e-3, errors of 2e-3 were seen. So values are asked for at 2e-4.

A tracked value is never above the true one of its place, but another eigenvalue may overtake unseen. Two things watch:
- Where it took more than 3 expansions the eigenvectors have turned far, and the result is verified as the first was
  (without, an error of 5 % was seen in the second epoch of an MLP).
- Where it did not, one more vector, orthogonal to those followed, takes a step of power iteration (one product). It
  tends to the largest eigenvalue beside them; once its Rayleigh quotient is beyond the k-th value it joins the start.
What overtakes abruptly beside steady eigenvectors may be missed for some measurements: verify the last with
`Hessian.eigenvalues(verify=True)`.
"""

import math
from typing import Any

import torch
from torch import Tensor

from samlite.curvature.hessian import Hessian
from samlite.curvature.results import Eigenvalues
from samlite.errors import UsageError

TOL = 1e-3  # relative error of each value
ASKED = 2e-4  # the bound that is asked for: see above
NEAR = 3  # expansions that eigenvectors which turned little take at most


class Tracker:
    """Follows the k largest eigenvalues of a Hessian whose model is being trained.

    In memory: k + 1 vectors of the number of parameters p from one measurement to the next, up to 2k + 30 in one, and
    what the `Hessian` keeps: the graphs of the last measurement, within its `memory`, until the next.
    """

    def __init__(self, hessian: Hessian, k: int) -> None:
        self.hessian, self.k = hessian, k
        self.vectors: Tensor | None = None  # (p, k), the start of the next measurement
        self.outsider: Tensor | None = None  # (p,), the vector of the power iteration

    def measure(self) -> dict[str, Any]:
        """`eigenvalues` at the present weights, largest first, None for one not found to 1e-3; `products` it took."""
        if self.vectors is None:
            result = self._eigenvalues(verify=True)
            products = result.matvecs
        else:
            result = self._eigenvalues(start=self.vectors, verify=False)
            products, vectors = result.matvecs, result.vectors
            assert vectors is not None
            if products > self.k + NEAR:
                result = self._eigenvalues(start=vectors, verify=True)
                products += result.matvecs
            elif self.k < len(vectors):
                missed = self._power_step(vectors, float(result.values[-1]))
                products += 1
                if missed is not None:
                    self.outsider = vectors[:, -1]  # whose place it takes
                    result = self._eigenvalues(start=torch.cat([vectors, missed[:, None]], dim=1), verify=False)
                    products += result.matvecs
        if result.complete is not False:  # else the next measurement starts as this one did
            self.vectors = result.vectors
        return {"eigenvalues": _trusted(result), "products": products}

    def state_dict(self) -> dict[str, Any]:
        """What the next measurement starts from."""
        return {"vectors": self.vectors, "outsider": self.outsider}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave. Raises UsageError where it is of another network or number of values."""
        like, p = self.hessian.params[0], self.hessian.shape[0]
        for name, shape in {"vectors": (p, self.k), "outsider": (p,)}.items():
            tensor = state[name]
            if tensor is not None and (tensor.shape, tensor.dtype) != (shape, like.dtype):
                raise UsageError(f"{name} must be {like.dtype} of shape {shape}, got {tuple(tensor.shape)}")
            setattr(self, name, None if tensor is None else tensor.to(like.device))

    def _eigenvalues(self, **options: Any) -> Eigenvalues:
        # The size of the basis is fixed, as the default depends on the free memory, and a resumed run must not.
        p = self.hessian.shape[0]
        basis = 2 * self.k + min(30, p + 2)
        return self.hessian.eigenvalues(self.k, tol=ASKED, vectors=True, basis=basis, **options)

    def _power_step(self, X: Tensor, last: float) -> Tensor | None:  # noqa: N803
        """A step beside the vectors X (p, k); returns its vector where that shows an eigenvalue beyond the last one."""
        v = self.outsider
        if v is None:
            generator = torch.Generator(device="cpu").manual_seed(0)
            v = torch.randn(len(X), generator=generator, dtype=torch.float32, device="cpu").to(X)
        for _ in range(2):  # twice is enough for orthogonality to rounding
            v = v - X @ (X.T @ v)
            v = v / v.norm()
        w = self.hessian @ v
        # Over a power of two, as the squares of a large or small product overflow or underflow.
        self.outsider = w * 2.0 ** -math.frexp(float(w.abs().max()))[1] if w.any() else v
        return v if float(v @ w) > last + TOL * abs(last) else None


def _trusted(result: Eigenvalues) -> list[float | None]:
    if result.complete is False:
        return [None] * len(result.values)
    within = result.errors <= TOL * result.values.abs()
    return [value if result.converged or ok else None for value, ok in zip(result.values.tolist(), within, strict=True)]
