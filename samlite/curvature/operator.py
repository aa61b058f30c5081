"""A symmetric matrix of the curvature, matrix-free: products, eigenvalues, traces and spectral density.

All of it comes from `samlite._C`, with an error bound or a standard error for every number.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from samlite.batches import described
from samlite.curvature.memory import free_bytes, parse_bytes
from samlite.curvature.results import Density, Eigenvalues, Estimate
from samlite.errors import UsageError
from samlite.intervals import student_t

if TYPE_CHECKING:
    from types import ModuleType

    from scipy.sparse.linalg import LinearOperator

Progress = Callable[[int, float], None]  # (products so far, worst error over what is allowed)

DEFLATION = 20  # Lanczos steps that find the large eigenvalues before a trace is left to chance


class Operator:
    """A symmetric matrix of the curvature, matrix-free: products, and eigenvalues with an error bound each."""

    names: list[str]
    """The names of the parameters."""
    params: list[nn.Parameter]
    """The parameters by which it is measured, whose dtype and device its vectors have."""
    memory: int
    """The bytes that the basis of a solver may take."""

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

    @property
    def shape(self) -> tuple[int, int]:
        """(p, p), p the number of parameters measured; tied ones count once."""
        p = sum(param.numel() for param in self.params)
        return p, p

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
            return _multiplied(columns[0], exponent)
        return _multiplied(torch.stack(columns, dim=1), exponent) if columns else torch.zeros_like(v)

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
                bounds take it that no two eigenvalues are closer than their residual. By default a single eigenvalue
                is held to its residual, which needs no such trust; that it is the largest only verify=True shows.
                With True, a bound uses a gap only where the search has shown it to be empty; where the search did
                not finish (`complete` is False), errors are residuals.
            start: eigenvectors (p,) or (p, s) of a nearby Hessian, such as that of the last epoch.
            basis: vectors held at once, at least 2k + 2; default 100 + 2k, fewer where they would exceed `memory`.
            max_matvecs: where products run out, `converged` is False and the errors say how far it got; default 1000,
                or 10 k where that is more.
            progress: called with (products so far, worst error over what is allowed).

        Raises:
            UsageError: a product is not finite, or so small that it has lost digits.
        """
        found, exponent, work = self.eigenpairs(
            k, which, method, tol, verify, start, seed, basis, max_matvecs, progress
        )
        values, errors, residuals = (
            torch.tensor([ldexp(x, exponent) for x in numbers], dtype=torch.float64, device="cpu")
            for numbers in (found.values, found.errors, found.residuals)
        )
        _require_float64(max(abs(x) for x in found.values), exponent, "eigenvalues")
        return Eigenvalues(
            values=values,
            errors=errors,
            residuals=residuals,
            vectors=found.vectors.T if vectors else None,
            converged=found.converged,
            complete=found.complete,
            matvecs=found.matvecs,
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
        if basis is None:
            basis = min(100 + 2 * k, self.memory // (p * self.params[0].element_size()))
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
        )
        began = time.perf_counter()
        with self.products() as operator:
            found = compiled().eigenpairs(operator, options, which, method)
            exponent = operator.exponent()
        return found, exponent, self.work(time.perf_counter() - began)

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
        found, exponent, work = self._traces(1, 1, tol, method, seed, max_matvecs, progress)
        return Estimate(*_power(found, 1, exponent), **work)

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
        require(0 < tol < 1, f"tol must be between 0 and 1, got {tol}")
        # The square root halves a relative error.
        found, exponent, work = self._traces(2, 2, min(2 * tol, 0.99), method, seed, max_matvecs, progress)
        square, error = found.values[1], found.errors[1]
        norm = math.sqrt(max(square, 0.0))
        stderr = error / (2 * norm) if norm > 0 else math.sqrt(error)
        return Estimate(ldexp(norm, exponent), ldexp(stderr, exponent), **work)

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
        require(isinstance(order, int) and 1 <= order <= 20, f"order must be between 1 and 20, got {order}")
        found, exponent, work = self._traces(order, 1, tol, method, seed, max_matvecs, progress)
        powers = torch.tensor(
            [_power(found, j, exponent) for j in range(1, order + 1)], dtype=torch.float64, device="cpu"
        )
        values, errors = powers.T / self.shape[0]
        return Estimate(values, errors, **work)

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
        require(0 < tol < 1, f"tol must be between 0 and 1, got {tol}")
        require(isinstance(steps, int) and steps >= 2, f"steps must be >= 2, got {steps}")
        require(width is None or width > 0, f"width must be > 0, got {width}")
        require(isinstance(points, int) and points >= 2, f"points must be >= 2, got {points}")
        p = self.shape[0]
        steps = max(2, min(steps, p, self.memory // (p * self.params[0].element_size())))
        generator = torch.Generator(device="cpu").manual_seed(seed)
        nodes, weights, matvecs = (*torch.zeros(2, 0, steps, dtype=torch.float64, device="cpu"), 0)
        began = time.perf_counter()
        with self.products() as operator:
            look = 3
            while True:
                signs = torch.randint(0, 2, (p,), generator=generator, dtype=torch.float32, device="cpu") * 2 - 1
                found = compiled().spectral_measure(operator, signs.to(self.params[0]), steps)
                matvecs += found.matvecs
                nodes, weights = (
                    torch.cat([rows.double(), nn.functional.pad(row, (0, steps - len(row)))[None]])
                    for rows, row in ((nodes, found.nodes), (weights, found.weights))
                )
                probes, exhausted = len(nodes), len(nodes) >= 3 and matvecs + steps > max_matvecs
                if probes < look and not exhausted:
                    continue
                look += max(1, look // 4)
                # In a unit near the largest node, as the squares of large densities overflow.
                unit = math.frexp(float(nodes.abs().max()))[1]
                exponent = unit + operator.exponent()
                scaled_width = None if width is None else ldexp(width, -exponent)
                grid, curves, sigma = _smoothed(_ldexp(nodes, -unit), weights, scaled_width, points)
                mean, stderr = curves.mean(0), curves.std(0) * (student_t(probes - 1) / 1.96) / math.sqrt(probes)
                error = float(stderr.mean() / mean.mean())
                if progress:
                    progress(matvecs, error / tol)
                if error <= tol or exhausted:
                    break
        work = self.work(time.perf_counter() - began)
        grid, nodes = _multiplied(grid, exponent), _multiplied(nodes, exponent - unit)
        mean, stderr = _multiplied(mean, -exponent), _ldexp(stderr, -exponent)
        sigma = ldexp(sigma, exponent)
        return Density(
            grid=grid,
            density=mean,
            stderr=stderr,
            nodes=nodes,
            weights=weights,
            width=sigma,
            probes=probes,
            converged=error <= tol,
            matvecs=matvecs,
            **work,
        )

    def _traces(
        self, order: int, watched: int, tol: float, method: str, seed: int, limit: int, progress: Progress | None
    ) -> tuple[Any, int, dict[str, Any]]:
        """(Traces of powers of this matrix over 2^exponent, the exponent, the work)."""
        require(0 < tol < 1, f"tol must be between 0 and 1, got {tol}")
        require(method in ("deflated", "hutchinson"), f"method must be 'deflated' or 'hutchinson', got {method!r}")
        require(limit >= 2 * order, f"max_matvecs must be >= {2 * order}, got {limit}")
        size = self.shape[0] * self.params[0].element_size()
        deflation = min(DEFLATION, self.memory // size, limit // 4) if method == "deflated" else 0
        options = compiled().ProbeOptions(tol=tol, max_matvecs=limit, deflation=deflation, seed=seed, progress=progress)
        began = time.perf_counter()
        with self.products() as operator:
            found = compiled().power_traces(operator, order, watched, options)
            exponent = operator.exponent() + math.frexp(found.unit)[1] - 1
        work = self.work(time.perf_counter() - began)
        return found, exponent, {"probes": found.probes, "converged": found.converged, "matvecs": found.matvecs, **work}

    def work(self, seconds: float) -> dict[str, float]:
        """The fields that every result ends with."""
        return {"gradient_evaluations": seconds / max(self.gradient_seconds(), 1e-9), "seconds": seconds}

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

    def products(self) -> AbstractContextManager[Any]:
        """The compiled operator, for use within."""
        raise NotImplementedError

    def gradient_seconds(self) -> float:
        """The unit of work."""
        raise NotImplementedError


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


def compiled() -> ModuleType:
    """`samlite._C`, loaded on first use and only beside the torch it was built for."""
    rebuild = "pip install --no-build-isolation --no-deps --force-reinstall ."
    running = torch.__version__.split("+")[0]
    try:
        built_for = import_module("samlite._torch_version").__version__.split("+")[0]
        if built_for == running:
            return import_module("samlite._C")
        reason = f"was built for torch {built_for}, but torch is {running}"
    except ImportError as error:
        reason = f"could not be loaded ({error})"
    raise ImportError(f"samlite._C {reason}; build it for this torch in a source folder of samlite: {rebuild}")


@contextmanager
def usage_errors() -> Iterator[None]:
    """What the compiled module refuses is a mistake of its user."""
    try:
        yield
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error


def check_steady(operator: Any) -> None:
    """Raises UsageError where the loss was not the same function at every pass."""
    drift = operator.drift()
    require(
        drift < 1e-4,
        "data and loss_fn must give the same batches and losses at every pass, got a loss that changed by "
        f"{drift:.1e} of itself; switch off shuffling, sampling and augmentation",
    )


def _smoothed(nodes: Tensor, weights: Tensor, width: float | None, points: int) -> tuple[Tensor, Tensor, float]:
    """(points,) of the grid, each probe's density there, and the width of the Gaussian."""
    low, high = float(nodes.min()), float(nodes.max())
    extent = max(high - low, abs(high), abs(low)) or 1e-30  # any, where all eigenvalues are 0
    # A rule of m nodes resolves about extent / m: a narrower Gaussian would show the nodes themselves.
    sigma = width or extent * max(0.01, 1 / nodes.shape[1])
    grid = torch.linspace(low - 4 * sigma, high + 4 * sigma, points, dtype=torch.float64, device="cpu")
    normal = torch.exp(-0.5 * ((grid[:, None, None] - nodes) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
    return grid, (normal * weights).sum(2).T, sigma


def ldexp(number: float, exponent: int) -> float:
    """number * 2^exponent, infinite or 0 beyond what a float64 holds."""
    try:
        return math.ldexp(number, exponent)
    except OverflowError:
        return math.copysign(math.inf, number)


def holds(number: float, exponent: int) -> bool:
    """Whether a float64 holds number * 2^exponent with all its digits."""
    return number == 0 or sys.float_info.min <= abs(ldexp(number, exponent)) < math.inf


def _require_float64(number: float, exponent: int, what: str) -> None:
    require(
        holds(number, exponent),
        f"{what} must be numbers that a float64 holds, got about 2^{math.frexp(number)[1] + exponent}; "
        "multiply the loss by a power of two",
    )


def _power(traces: Any, order: int, exponent: int) -> tuple[float, float]:
    """tr(H^order) and its standard error."""
    value, error = float(traces.values[order - 1]), float(traces.errors[order - 1])
    _require_float64(value, order * exponent, f"the traces of H^{order}")
    return ldexp(value, order * exponent), ldexp(error, order * exponent)


def _ldexp(block: Tensor, exponent: int) -> Tensor:
    half = exponent // 2  # as 2^exponent itself may not be a number
    return block * 2.0**half * 2.0 ** (exponent - half)


def _multiplied(block: Tensor, exponent: int) -> Tensor:
    """block * 2^exponent, column by column within the numbers that its type holds."""
    if exponent == 0:
        return block
    result = _ldexp(block, exponent)
    kind, before, after = torch.finfo(block.dtype), block.abs().amax(0), result.abs().amax(0)
    require(
        bool(((before == 0) | ~before.isfinite() | ((after >= kind.tiny) & after.isfinite())).all()),
        f"products must be numbers that {kind.dtype} holds, got some about 2^{exponent} times "
        f"{float(before.max()):.1e}; multiply the loss by a power of two",
    )
    return result


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)
