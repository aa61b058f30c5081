"""A symmetric matrix of the curvature, matrix-free: products, eigenvalues, traces and spectral density.

All of it comes from `samlite._C`, with an error bound or a standard error for every number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from samlite.batches import described
from samlite.curvature import density, traces
from samlite.curvature.compiled import compiled, usage_errors
from samlite.curvature.matrix import Matrix, Progress
from samlite.curvature.memory import free_bytes, parse_bytes
from samlite.curvature.results import Density, Eigenvalues, Estimate
from samlite.curvature.scaling import ldexp, multiplied, require_float64
from samlite.errors import UsageError, require

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


class Operator(Matrix):
    """A symmetric matrix of the curvature, matrix-free: products, and eigenvalues with an error bound each."""

    @staticmethod
    def of(matvec: Callable[[Tensor], Tensor], like: Tensor, *, memory: int | str | None = None) -> Operator:
        """Any symmetric matrix, by its products: the same solvers, errors and certificates.

        ```python
        matrix = torch.diag(torch.arange(1.0, 101.0))
        top = samlite.Operator.of(lambda v: matrix @ v, torch.empty(100)).eigenvalues(3)
        ```

        Args:
            matvec: multiplies a vector like `like`, without autograd.
            like: a vector (p,) in float32 or float64, on the device of the products. Its values do not matter.
            memory: bytes (or "2GB") for the vectors of a solver; default half of what is free.

        Raises:
            UsageError: `like` is no such vector, a product has another shape, dtype or device, or the matrix is not
                symmetric, as two random products show.
        """
        return _Given(matvec, like, memory)

    def __matmul__(self, v: Tensor) -> Tensor:
        """H v for a flat vector (p,), or for each column of a block (p, m)."""
        if not isinstance(v, Tensor) or v.dim() not in (1, 2) or len(v) != self.shape[0]:
            raise UsageError(
                f"v must be a tensor of shape ({self.shape[0]},) or ({self.shape[0]}, m), "
                f"got {tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__}"
            )
        if v.is_complex():
            return torch.complex(self @ v.real, self @ v.imag)
        like = self.params[0]
        v = v.detach().to(like.device, like.dtype)
        with self.products() as operator:
            columns = [operator.apply(column.contiguous()) for column in v.reshape(len(v), -1).T]
            exponent = operator.exponent() if columns else 0
        if v.dim() == 1:
            return multiplied(columns[0], exponent)
        return multiplied(torch.stack(columns, dim=1), exponent) if columns else torch.zeros_like(v)

    def to_scipy(self) -> LinearOperator:
        """This operator for scipy.sparse.linalg, on numpy arrays; products have the parameters' type.

        It is its own transpose and adjoint. Of complex vectors both parts are multiplied.
        """
        import numpy as np
        from scipy.sparse.linalg import LinearOperator

        dtype = torch.empty(0, dtype=self.params[0].dtype, device="cpu").numpy().dtype

        def products(block: Any) -> Any:
            if np.iscomplexobj(block):
                return products(block.real) + 1j * products(block.imag)
            return (self @ torch.from_numpy(np.array(block, dtype=dtype, order="C"))).cpu().numpy()

        def product(v: Any) -> Any:
            return products(v.reshape(-1))

        return LinearOperator(
            self.shape, matvec=product, rmatvec=product, matmat=products, rmatmat=products, dtype=dtype
        )

    def eigenvalues(
        self,
        k: int = 1,
        which: Literal["LA", "SA", "LM"] = "LA",
        method: Literal["lanczos", "power"] = "lanczos",
        *,
        tol: float = 1e-3,
        verify: bool | None = None,
        vectors: bool = False,
        start: Tensor | None = None,
        seed: int = 0,
        basis: int | None = None,
        max_matvecs: int | None = None,
        progress: Progress | None = None,
    ) -> Eigenvalues:
        """The k largest (LA), smallest (SA) or largest-in-magnitude (LM) eigenvalues, each to a relative error `tol`.

        Args:
            method: thick-restart Lanczos, or power iteration (slow; a baseline).
            verify: search for eigenvalues that one Krylov space cannot hold (repeated and clustered ones), at about
                5 to 10 more products where the rest of the spectrum lies below; default for k > 1. With False, error
                bounds assume that eigenvalues are separated by more than their residuals. For k = 1 the default bound
                is the residual itself, which needs no assumption but does not prove that the value is the largest;
                verify=True does. With True, a bound uses a gap only where the search has shown it to be empty; where
                the search did not finish (`complete` is False), errors are residuals.
            start: eigenvectors (p,) or (p, s) of a nearby Hessian, such as that of the last epoch.
            basis: vectors held at once, at least 2k + 2; default 100 + 2k, fewer where they would exceed `memory`.
            max_matvecs: where products run out, `converged` is False and the errors say how far it got; default 1000,
                or 10 k where that is more.
            progress: called with (products so far, worst error over what is allowed).

        Raises:
            UsageError: a product is not finite, or so small that it has lost digits.
        """
        pairs, exponent, work = self.eigenpairs(
            k, which, method, tol, verify, start, seed, basis, max_matvecs, progress
        )
        values, errors, residuals = (
            torch.tensor([ldexp(x, exponent) for x in numbers], dtype=torch.float64, device="cpu")
            for numbers in (pairs.values, pairs.errors, pairs.residuals)
        )
        require_float64(max(abs(x) for x in pairs.values), exponent, "eigenvalues")
        inexact = torch.tensor(self.product_errors(pairs.vectors), dtype=torch.float64, device="cpu")
        errors, residuals = errors + inexact, residuals + inexact
        return Eigenvalues(
            values=values,
            errors=errors,
            residuals=residuals,
            vectors=pairs.vectors.T if vectors else None,
            converged=pairs.converged and bool((inexact <= tol * values.abs()).all()),
            complete=pairs.complete,
            matvecs=pairs.matvecs,
            **work,
        )

    def eigenpairs(
        self,
        k: int = 1,
        which: str = "LA",
        method: str = "lanczos",
        tol: float = 1e-3,
        verify: bool | None = None,
        start: Tensor | None = None,
        seed: int = 0,
        basis: int | None = None,
        max_matvecs: int | None = None,
        progress: Progress | None = None,
    ) -> tuple[Any, int, dict[str, float]]:
        """(The compiled eigenpairs of this matrix over 2^exponent, the exponent, the work)."""
        p = self.shape[0]
        require(isinstance(k, int) and 1 <= k <= p, f"k must be between 1 and the dimension {p}, got {k}")
        require(which in ("LA", "SA", "LM"), f"which must be LA, SA or LM, got {which!r}")
        require(method in ("lanczos", "power"), f"method must be 'lanczos' or 'power', got {method!r}")
        require(0 < tol < 1, f"tol must be between 0 and 1, got {tol}")
        max_matvecs = max(1000, 10 * k) if max_matvecs is None else max_matvecs
        require(max_matvecs > k, f"max_matvecs must be > k={k}, got {max_matvecs}")
        require(basis is None or basis >= 2 * k + 2, f"basis must be >= 2k + 2 = {2 * k + 2} vectors, got {basis}")
        basis = self.basis(k) if basis is None else basis
        options = compiled().Options(
            k=k,
            tol=tol,
            verify=k > 1 if verify is None else verify,
            separated=k > 1 or verify is not None,
            basis=basis,
            max_matvecs=max_matvecs,
            seed=seed,
            start=None if start is None else self._rows(start),
            progress=progress,
            precision=self.precision(),
        )
        began = time.perf_counter()
        with self.products() as operator:
            pairs = compiled().eigenpairs(operator, options, which, method)
            exponent = operator.exponent()
        return pairs, exponent, self.work(time.perf_counter() - began)

    def basis(self, k: int) -> int:
        """How many vectors the basis of k eigenvalues has by default: fewer where they would exceed the memory."""
        return min(100 + 2 * k, self.room())

    def trace(
        self,
        tol: float = 0.05,
        method: Literal["deflated", "hutchinson"] = "deflated",
        *,
        seed: int = 0,
        max_matvecs: int = 2000,
        progress: Progress | None = None,
    ) -> Estimate[float]:
        """The trace, to a standard error of `tol` times its value.

        Args:
            method: Hutchinson's estimator, by itself or with the large eigenvalues that 20 steps of Lanczos find taken
                out of its variance. Both are unbiased for any symmetric matrix.
            max_matvecs: where products run out, `converged` is False and the standard error says how far it got.
        """
        return traces.trace(self, tol, method, seed, max_matvecs, progress)

    def frobenius(
        self,
        tol: float = 0.05,
        method: Literal["deflated", "hutchinson"] = "deflated",
        *,
        seed: int = 0,
        max_matvecs: int = 2000,
        progress: Progress | None = None,
    ) -> Estimate[float]:
        """The Frobenius norm, to a standard error of `tol` times its value; arguments as of `trace`."""
        return traces.frobenius(self, tol, method, seed, max_matvecs, progress)

    def spectral_moments(
        self,
        order: int = 4,
        tol: float = 0.05,
        method: Literal["deflated", "hutchinson"] = "deflated",
        *,
        seed: int = 0,
        max_matvecs: int = 2000,
        progress: Progress | None = None,
    ) -> Estimate[Tensor]:
        """tr(H^j) / p for j = 1 .. order, all to a standard error of `tol` times its value; arguments as of `trace`."""
        return traces.spectral_moments(self, order, tol, method, seed, max_matvecs, progress)

    def density(
        self,
        tol: float = 0.05,
        *,
        steps: int = 80,
        width: float | None = None,
        points: int = 1024,
        seed: int = 0,
        max_matvecs: int = 2000,
        progress: Progress | None = None,
    ) -> Density:
        """The spectral density by stochastic Lanczos quadrature, until its mean standard error is `tol` times its mean.

        Ubaru, Chen and Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature" (2017).

        Args:
            steps: of Lanczos for each probe. Their vectors are held at once, so fewer where `memory` asks.
            width: standard deviation of the Gaussian that smooths the density; default 1 % of the spectrum's extent,
                or what so many steps resolve.
            max_matvecs: where products run out, `converged` is False; 3 probes are the least.
        """
        return density.density(self, tol, steps, width, points, seed, max_matvecs, progress)

    def _rows(self, start: Tensor) -> Tensor:
        p = self.shape[0]
        if not isinstance(start, Tensor) or start.dim() not in (1, 2) or len(start) != p:
            raise UsageError(
                f"start must be of shape ({p},) or ({p}, s), "
                f"got {tuple(start.shape) if isinstance(start, Tensor) else type(start).__name__}"
            )
        rows = start.detach().reshape(p, -1).T.to(self.params[0].device, self.params[0].dtype)
        require(bool(rows.isfinite().all()), "start must be finite, got nan or inf in it")
        return rows


class _Given(Operator):
    """A matrix given by its products. Its unit of work is one of them."""

    def __init__(self, matvec: Callable[[Tensor], Tensor], like: Tensor, memory: int | str | None) -> None:
        vector = isinstance(like, Tensor) and like.dim() == 1 and like.numel() > 0
        require(
            vector and like.dtype in (torch.float32, torch.float64),
            f"like must be a float32 or float64 vector (p,), got {described(like)}",
        )
        self.names = ["v"]
        self.params = [nn.Parameter(torch.empty_like(like), requires_grad=False)]
        self.memory = free_bytes(like.device) // 2 if memory is None else parse_bytes(memory)
        self._matvec = matvec
        self._check_symmetry()

    def _check_symmetry(self) -> None:
        like, generator = self.params[0], torch.Generator(device="cpu").manual_seed(0)
        u, v = torch.randn(2, len(like), generator=generator, dtype=torch.float32, device="cpu").to(like)
        began = time.perf_counter()
        first, second = self @ u, self @ v
        difference = float(v.dot(first) - u.dot(second))
        scale = float(first.norm() * v.norm() + second.norm() * u.norm())
        self._seconds = (time.perf_counter() - began) / 2
        require(
            not abs(difference) > 100 * torch.finfo(like.dtype).eps * scale,  # nan is told by what is asked
            f"matvec must be symmetric, got u . A v and v . A u that differ by {difference:.1e}",
        )

    @contextmanager
    def products(self) -> Iterator[Any]:
        """The compiled operator, for use within."""
        like = self.params[0].detach()
        with torch.no_grad(), usage_errors():
            yield compiled().Callable(self._product, like, like.numel())

    def _product(self, v: Tensor) -> Tensor:
        product = self._matvec(v)
        fits = isinstance(product, Tensor) and product.shape == v.shape
        require(
            fits and (product.dtype, product.device) == (v.dtype, v.device),
            f"matvec must return a vector like {described(v)}, got {described(product)}",
        )
        return product

    def gradient_seconds(self) -> float:
        """Seconds of a product."""
        return self._seconds
