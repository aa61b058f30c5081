"""The largest Hessian eigenvalues followed over a training run, each measurement starting from the last one's vectors.

The first measurement starts at random and is verified. Later ones are Rayleigh-Ritz on the last eigenvectors, expanded
by residuals until r^2 / gap is small enough. The gap is to what those few vectors show of the spectrum, and the nearest
eigenvalue may not be among it: at a bound of 1e-3, errors of 2e-3 were seen. So values are asked for at 2e-4.

A tracked value is never above the true one of its place, but another eigenvalue may overtake unseen. So one more
vector, orthogonal to those followed, takes a step of power iteration a measurement (one product). It tends to the
largest eigenvalue beside them, and once its Rayleigh quotient is beyond the k-th value it joins the start. What
overtakes abruptly may still be missed for some measurements; `Hessian.eigenvalues(verify=True)` is the check.
"""

from typing import Any

import torch
from torch import Tensor

from samlite.hessian import Hessian
from samlite.operator import Eigenvalues

TOL = 1e-3  # relative error of each value
ASKED = 2e-4  # the bound that is asked for: see above


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
            found = self._eigenvalues(verify=True)
            products = found.matvecs
        else:
            found = self._eigenvalues(start=self.vectors, verify=False)
            missed = self._power_step(found)
            products = found.matvecs + 1
            if missed is not None:
                assert found.vectors is not None
                self.outsider = found.vectors[:, -1]  # that it takes the place of
                found = self._eigenvalues(start=torch.cat([found.vectors, missed[:, None]], dim=1), verify=False)
                products += found.matvecs
        if found.complete is not False:  # else the next measurement starts at random again
            self.vectors = found.vectors
        return {"eigenvalues": _trusted(found), "products": products}

    def state_dict(self) -> dict[str, Any]:
        """What the next measurement starts from."""
        return {"vectors": self.vectors, "outsider": self.outsider}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self.hessian.params[0].device
        for name in ("vectors", "outsider"):
            tensor = state[name]
            setattr(self, name, None if tensor is None else tensor.to(device))

    def _eigenvalues(self, **options: Any) -> Eigenvalues:
        # The size of the basis is fixed, as the default depends on the free memory, and a resumed run must not.
        p = self.hessian.shape[0]
        basis = 2 * self.k + min(30, p + 2)
        return self.hessian.eigenvalues(self.k, tol=ASKED, vectors=True, basis=basis, **options)

    def _power_step(self, found: Eigenvalues) -> Tensor | None:
        """One step beside the vectors found; returns the vector where it shows that an eigenvalue was missed."""
        X = found.vectors  # noqa: N806  (p, k)
        assert X is not None
        p = len(X)
        if self.k == p:
            return None
        v = self.outsider
        if v is None:
            v = torch.randn(p, generator=torch.Generator().manual_seed(0)).to(X)
        for _ in range(2):  # twice is enough for orthogonality to rounding
            v = v - X @ (X.T @ v)
            v = v / v.norm()
        w = self.hessian @ v
        self.outsider = w if w.any() else v
        last = float(found.values[-1])
        return v if float(v @ w) > last + TOL * abs(last) else None


def _trusted(found: Eigenvalues) -> list[float | None]:
    if found.complete is False:
        return [None] * len(found.values)
    within = found.errors <= TOL * found.values.abs()
    return [value if found.converged or ok else None for value, ok in zip(found.values.tolist(), within, strict=True)]
