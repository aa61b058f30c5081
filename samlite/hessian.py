"""The Hessian of a model's mean loss over a data set, as a matrix-free operator, and its eigenvalues.

Products are exact double backward through graphs that are kept while memory allows; eigenvalues come from
`samlite._C` with an error bound each. The Hessian is that of the loss alone: weight decay and other penalties of a
training loop are not in it. Where the loss has kinks (ReLU, max-pool) it is the Hessian almost everywhere, as autograd
defines it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from samlite.losses import PROBE, Data, Loss, Losses, full_precision, is_pair
from samlite.moments import Moments, Samples, Unit

if TYPE_CHECKING:
    from types import ModuleType

    from scipy.sparse.linalg import LinearOperator

Progress = Callable[[int, float], None]


@dataclass(frozen=True)
class Eigenvalues:
    """The k eigenvalues asked for, best first, each with a bound on its distance to a true one."""

    values: Tensor  # (k,) float64, on the host
    errors: Tensor  # (k,) |value - eigenvalue| is at most this
    residuals: Tensor  # (k,) |H x - value x| of the unit vector x behind each value
    vectors: Tensor | None  # (p, k) on the parameters' device, if asked for
    converged: bool  # every error is at most tol * |value|
    complete: bool | None  # True: checked that none was missed; False: the check did not finish; None: not checked
    matvecs: int  # products H v
    gradient_evaluations: float  # the work in full gradients, a product counted as what it measures at
    seconds: float


class Operator:
    """A symmetric matrix of the curvature, matrix-free: products, and eigenvalues with an error bound each."""

    names: list[str]
    params: list[nn.Parameter]  # that it is measured by
    memory: int  # bytes

    @property
    def shape(self) -> tuple[int, int]:
        """(p, p), p the number of parameters measured; tied ones count once."""
        p = sum(param.numel() for param in self.params)
        return p, p

    def __matmul__(self, v: Tensor) -> Tensor:
        """H v for a flat vector (p,), or for each column of a block (p, m)."""
        if not isinstance(v, Tensor) or v.dim() not in (1, 2) or len(v) != self.shape[0]:
            raise ValueError(
                f"v must be a tensor of shape ({self.shape[0]},) or ({self.shape[0]}, m), "
                f"got {tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__}"
            )
        like = self.params[0]
        v = v.detach().to(like.device, like.dtype)
        with self._products() as operator:
            columns = [operator.apply(column.contiguous()) for column in v.reshape(len(v), -1).T]
        return columns[0] if v.dim() == 1 else torch.stack(columns, dim=1)

    def to_scipy(self) -> LinearOperator:
        """This operator for scipy.sparse.linalg, on numpy arrays of the parameters' type."""
        import numpy as np
        from scipy.sparse.linalg import LinearOperator

        def product(v: Any) -> Any:
            return (self @ torch.from_numpy(np.ascontiguousarray(v))).cpu().numpy()

        dtype = torch.empty(0, dtype=self.params[0].dtype).numpy().dtype
        return LinearOperator(self.shape, matvec=lambda v: product(v.reshape(-1)), matmat=product, dtype=dtype)

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
        max_matvecs: int = 1000,
        progress: Progress | None = None,
    ) -> Eigenvalues:
        """The k largest (LA), smallest (SA) or largest-in-magnitude (LM) eigenvalues, each to a relative error `tol`.

        Args:
            method: thick-restart Lanczos, or power iteration (slow; a baseline).
            verify: search for eigenvalues that one Krylov space cannot hold (repeated and clustered ones), at about
                5 to 10 more products where the rest of the spectrum lies below; default for k > 1. With False, error
                bounds take it that no two eigenvalues are closer than their residual. By default a single eigenvalue
                is held to its residual, which needs no such trust; that it is the largest only verify=True shows.
            start: eigenvectors (p,) or (p, s) of a nearby Hessian, such as that of the last epoch.
            basis: vectors held at once, at least 2k + 2; default 100 + 2k, fewer where they would exceed `memory`.
            max_matvecs: where products run out, `converged` is False and the errors say how far it got.
            progress: called with (products so far, worst error over what is allowed).
        """
        p = self.shape[0]
        _require(isinstance(k, int) and 1 <= k <= p, f"k must be between 1 and the dimension {p}, got {k}")
        _require(which in ("LA", "SA", "LM"), f"which must be LA, SA or LM, got {which!r}")
        _require(method in ("lanczos", "power"), f"method must be 'lanczos' or 'power', got {method!r}")
        _require(0 < tol < 1, f"tol must be between 0 and 1, got {tol}")
        _require(max_matvecs > k, f"max_matvecs must be > k={k}, got {max_matvecs}")
        _require(basis is None or basis >= 2 * k + 2, f"basis must be >= 2k + 2 = {2 * k + 2} vectors, got {basis}")
        if basis is None:
            basis = min(100 + 2 * k, self.memory // (p * self.params[0].element_size()))
        options = _module().Options(
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
        with self._products() as operator:
            found = _module().eigenpairs(operator, options, which, method)
        seconds = time.perf_counter() - began
        return Eigenvalues(
            values=torch.tensor(found.values, dtype=torch.float64),
            errors=torch.tensor(found.errors, dtype=torch.float64),
            residuals=torch.tensor(found.residuals, dtype=torch.float64),
            vectors=found.vectors.T if vectors else None,
            converged=found.converged,
            complete=found.complete,
            matvecs=found.matvecs,
            gradient_evaluations=seconds / max(self._gradient_seconds(), 1e-9),
            seconds=seconds,
        )

    def _rows(self, start: Tensor) -> Tensor:
        p = self.shape[0]
        if not isinstance(start, Tensor) or start.dim() not in (1, 2) or len(start) != p:
            raise ValueError(
                f"start must be of shape ({p},) or ({p}, s), "
                f"got {tuple(start.shape) if isinstance(start, Tensor) else type(start).__name__}"
            )
        rows = start.detach().reshape(p, -1).T.to(self.params[0].device, self.params[0].dtype)
        _require(bool(rows.isfinite().all()), "start must be finite, got nan or inf in it")
        return rows

    def _products(self) -> AbstractContextManager[Any]:
        """The compiled operator, for use within."""
        raise NotImplementedError

    def _gradient_seconds(self) -> float:
        """The unit of work."""
        raise NotImplementedError


class Hessian(Operator):
    """H = (1/n) sum_i of the second derivatives of sample i's loss by the parameters: ``h @ v``, ``h.eigenvalues()``.

    Args:
        model: any module. It is left as it was found: weights, gradients, modes, buffers, random state.
        loss_fn: a loss module, taken as criterion(model(inputs), targets) with its own denominator
            (ignore_index, class weights); or ``loss_fn(model, batch)`` that returns the mean loss over the batch, or
            (mean loss, weight) where its denominator is not the number of samples.
        data: an (inputs, targets) pair of tensors, or a re-iterable of batches, the same at every pass. Batches of
            unequal size count by their samples.
        params: which parameters, as name patterns (``"layer3.*"``) or tensors; default all that require a gradient.
        memory: bytes (or "2GB") that kept graphs may take; default half of what is free. Beyond it graphs are built
            anew at every product, with the same results.
        mode: "eval", or "train" for the function with batch statistics.

    Raises:
        ValueError: an argument is not usable; the line names it, the rule and the fix.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Loss,
        data: Data,
        *,
        params: str | Iterable[str] | Iterable[nn.Parameter] | None = None,
        memory: int | str | None = None,
        mode: Literal["eval", "train"] = "eval",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if mode not in ("eval", "train"):
            raise ValueError(f"mode must be 'eval' or 'train', got {mode!r}")
        model = getattr(model, "_orig_mod", model)  # compiled graphs have no second derivative
        self.names, self.params = _selected(model, params)
        self.mode = mode
        self.memory = _free_memory(self.params[0].device) // 2 if memory is None else _bytes(memory)
        self._loss_fn, self._data = loss_fn, data
        self._losses = Losses(model, loss_fn, data, self.params, mode)
        self._losses.probe(PROBE)
        self._operator: Any = None
        self._state: list[tuple[Any, ...]] = []
        self._moments: dict[str, tuple[list[tuple[Any, ...]], Samples]] = {}

    def moments(
        self,
        order: int = 4,
        unit: Unit = "sample",
        *,
        tol: float = 1e-3,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Moments:
        """Sharpness a and the non-uniformity s_2 .. s_order of the per-sample Hessians (or of those of batches).

        Args:
            order: the highest moment; M_k v costs k steps of about one product H v each.
            unit: "sample", or "batch" for each batch of `data` as one, weighted by its share: the moments of
                mini-batch SGD.
            tol: relative error of each eigenvalue.

        Raises:
            ValueError: samples depend on each other (batch norm with batch statistics), or are not told apart.
        """
        _require(isinstance(order, int) and 2 <= order <= 8, f"order must be between 2 and 8, got {order}")
        began = time.perf_counter()
        first = self.eigenvalues(1, tol=tol, seed=seed, progress=progress)
        found = {
            k: self.moment_operator(k, unit).eigenvalues(1, tol=tol, seed=seed, progress=progress)
            for k in range(2, order + 1)
        }
        powers = {k: float(e.values[0]) for k, e in found.items()}
        seconds = time.perf_counter() - began
        return Moments(
            sharpness=float(first.values[0]),
            nonuniformity={k: max(power, 0.0) ** (1 / k) for k, power in powers.items()},
            powers=powers,
            errors={1: float(first.errors[0]), **{k: float(e.errors[0]) for k, e in found.items()}},
            unit=unit,
            fallback=self._samples(unit).fallback,
            converged=first.converged and all(e.converged for e in found.values()),
            matvecs=first.matvecs + sum(e.matvecs for e in found.values()),
            gradient_evaluations=seconds / max(self._gradient_seconds(), 1e-9),
            seconds=seconds,
        )

    def moment_operator(self, order: int, unit: Unit = "sample") -> MomentOperator:
        """M_order - H^order, with the interface of this one."""
        _require(isinstance(order, int) and order >= 1, f"order must be >= 1, got {order}")
        return MomentOperator(self, order, unit)

    def _samples(self, unit: Unit) -> Samples:
        """The per-sample Hessians at the model's present weights."""
        _require(unit in ("sample", "batch"), f"unit must be 'sample' or 'batch', got {unit!r}")
        _require(
            unit == "sample" or not is_pair(self._data),
            "unit='batch' needs data in batches, got a pair of tensors; pass list(zip(x.split(128), y.split(128)))",
        )
        state = _fingerprint(self._losses.model)
        known, samples = self._moments.get(unit, (None, None))
        if samples is None or known != state:
            self._moments.pop(unit, None)
            losses = Losses(self._losses.model, self._loss_fn, self._data, self.params, self.mode)
            with full_precision():
                samples = Samples(_module(), losses, self.memory, unit)
            self._moments[unit] = state, samples
        return samples

    def _gradient_seconds(self) -> float:
        return float(self._operator.build_seconds) if self._operator is not None else 0.0

    @contextmanager
    def _products(self) -> Iterator[Any]:
        """The compiled operator, exact and checked: what goes wrong in a product is raised with its reason."""
        try:
            with full_precision():
                operator = self._current()
                yield operator
        except RuntimeError as error:
            raise self._explained(error) from error
        _check_steady(operator)

    def _current(self) -> Any:
        """The operator at the model's present weights: graphs of earlier weights are let go."""
        state = _fingerprint(self._losses.model)
        if self._operator is None or state != self._state:
            self._operator, losses = None, self._losses
            operator = _module().Hessian(self.params, losses.rewind, losses.next, self.memory)
            if losses.chunk and self.mode == "eval":  # as many rows a chunk as have a graph within the memory
                losses.fit(operator.measure, self.memory)
            self._operator, self._state = operator, state
        return self._operator

    def _explained(self, error: RuntimeError) -> Exception:
        """Names the parameter behind an operation that cannot be differentiated twice."""
        if not re.search(r"derivative for|not implemented|double backward|differentiate twice", str(error)):
            return error
        self._losses.rewind(0)
        item = self._losses.next()
        assert item is not None
        for name, param in zip(self.names, self.params, strict=True):
            try:
                (gradient,) = torch.autograd.grad(
                    item[0], [param], create_graph=True, retain_graph=True, allow_unused=True
                )
                if gradient is not None and gradient.requires_grad:
                    torch.autograd.grad(gradient.sum(), self.params, retain_graph=True, allow_unused=True)
            except RuntimeError as culprit:
                reason = str(culprit).splitlines()[0]
                return ValueError(
                    f"the loss must be twice differentiable, got an operation behind {name} that is not ({reason}); "
                    "replace the operation, or leave the parameter out with params="
                )
        return error


class MomentOperator(Operator):
    """M_k - H^k of the Hessians of samples (or batches), at the model's present weights."""

    def __init__(self, hessian: Hessian, order: int, unit: Unit) -> None:
        self.names, self.params, self.memory = hessian.names, hessian.params, hessian.memory
        self.order, self.unit = order, unit
        self._hessian = hessian

    @contextmanager
    def _products(self) -> Iterator[Any]:
        moments = self._hessian._samples(self.unit).operator
        with full_precision():
            yield _module().Centred(moments, self.order)
        _check_steady(moments)

    def _gradient_seconds(self) -> float:
        return self._hessian._gradient_seconds() or float(self._hessian._samples(self.unit).operator.build_seconds)


def _module() -> ModuleType:
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


def _check_steady(operator: Any) -> None:
    """Raises ValueError where the loss was not the same function at every pass."""
    drift = operator.drift()
    _require(
        drift < 1e-4,
        "data and loss_fn must give the same batches and losses at every pass, got a loss that changed by "
        f"{drift:.1e} of itself; switch off shuffling, sampling and augmentation",
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _selected(
    model: nn.Module, params: str | Iterable[str] | Iterable[nn.Parameter] | None
) -> tuple[list[str], list[nn.Parameter]]:
    """Names and parameters to measure, each tied one once."""
    named = dict(model.named_parameters(remove_duplicate=False))
    if params is None:
        chosen = {name: p for name, p in named.items() if p.requires_grad}
        _require(bool(chosen), "model must have parameters that require a gradient, got none")
    else:
        items = [params] if isinstance(params, str) else list(params)
        patterns = [item for item in items if isinstance(item, str)]
        tensors = {id(item) for item in items if isinstance(item, Tensor)}
        chosen = {
            name: p
            for name, p in named.items()
            if id(p) in tensors or any(fnmatchcase(name, pattern) for pattern in patterns)
        }
        known = ", ".join(list(named)[:6]) + (", ..." if len(named) > 6 else "")
        for pattern in patterns:
            _require(
                any(fnmatchcase(name, pattern) for name in named),
                f"params must match parameter names, got {pattern!r}; the model has {known}",
            )
        _require(
            bool(chosen) and tensors <= {id(p) for p in chosen.values()},
            f"params must be parameters of the model or patterns of their names; the model has {known}",
        )
        frozen = [name for name, p in chosen.items() if not p.requires_grad]
        if tensors or len(frozen) == len(chosen):
            _require(not frozen, f"params must require a gradient, got {', '.join(frozen)} without")
        chosen = {name: p for name, p in chosen.items() if p.requires_grad}
    unique: dict[int, tuple[str, nn.Parameter]] = {}
    for name, p in chosen.items():
        unique.setdefault(id(p), (name, p))
    names, parameters = [name for name, _ in unique.values()], [p for _, p in unique.values()]
    kinds = {(p.dtype, p.device) for p in parameters}
    _require(
        len(kinds) == 1 and parameters[0].dtype in (torch.float32, torch.float64),
        "the measured parameters must all be float32, or all float64, on one device, got "
        + ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds)),
    )
    broken = [name for name, p in zip(names, parameters, strict=True) if not p.isfinite().all()]
    _require(not broken, f"the weights must be finite, got nan or inf in {', '.join(broken)}")
    return names, parameters


def _fingerprint(model: nn.Module) -> list[tuple[Any, ...]]:
    """Changes when the weights or buffers do: version and place, and a norm for changes through `.data`."""
    tensors = [*model.parameters(), *model.buffers()]
    norms = torch._foreach_norm([t.detach() for t in tensors if t.is_floating_point()])
    values = torch.stack([n.double() for n in norms]).tolist() if norms else []
    return [*((t._version, t.data_ptr()) for t in tensors), *((v,) for v in values)]


def _bytes(memory: int | str) -> int:
    units = {"": 1, "B": 1, "KB": 2**10, "MB": 2**20, "GB": 2**30, "TB": 2**40}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?B?)\s*", str(memory).upper())
    _require(match is not None, f"memory must be bytes or a size such as '2GB', got {memory!r}")
    assert match is not None
    unit = match[2] if match[2] in units else match[2] + "B"
    return int(float(match[1]) * units[unit])


def _free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 4 * 2**30  # no portable way to ask; a modest guess, which `memory` overrides
