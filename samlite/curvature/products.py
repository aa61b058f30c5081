"""Products of the Hessian of a model's mean loss over a data set with vectors.

They are exact double backward through graphs that are kept while memory allows. The Hessian is that of the loss alone:
weight decay and other penalties of a training loop are not in it. Where the loss has kinks (ReLU, max-pool) it is the
Hessian almost everywhere, as autograd defines it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from samlite.batches import is_pair
from samlite.curvature.compiled import compiled, usage_errors
from samlite.curvature.criterion import Loss
from samlite.curvature.differences import Differences
from samlite.curvature.function import Losses, flat_gradient
from samlite.curvature.gauss_newton import Curves, Kind
from samlite.curvature.memory import free_bytes, parse_bytes
from samlite.curvature.moved import Moved
from samlite.curvature.neutral import check_real
from samlite.curvature.operator import Operator
from samlite.curvature.parameters import bare, selected
from samlite.curvature.results import Footprint
from samlite.curvature.samples import Samples, Unit
from samlite.curvature.stream import PROBE, Data, End
from samlite.distributed import Ranks
from samlite.errors import UsageError, require

if TYPE_CHECKING:
    from typing_extensions import Self

_IN_FLIGHT = 7  # vectors that a product and its solver hold beside the basis, as measured
Products = Literal["autograd", "finite-difference"]


class HessianProducts(Operator):
    """H of a data set: its products with vectors, its gradient, and the Hessians of single samples. See `Hessian`."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Loss,
        data: Data,
        *,
        params: str | Iterable[str] | Iterable[nn.Parameter] | None = None,
        curvature: Kind = "hessian",
        memory: int | str | None = None,
        mode: Literal["eval", "train"] = "eval",
        process_group: Any = None,
        products: Products = "autograd",
    ) -> None:
        check_real()
        if not isinstance(model, nn.Module):
            raise UsageError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        require(mode in ("eval", "train"), f"mode must be 'eval' or 'train', got {mode!r}")
        require(curvature in ("hessian", "ggn"), f"curvature must be 'hessian' or 'ggn', got {curvature!r}")
        require(
            products in ("autograd", "finite-difference"),
            f"products must be 'autograd' or 'finite-difference', got {products!r}",
        )
        require(
            products == "autograd" or curvature == "hessian",
            "products='finite-difference' needs curvature='hessian', got 'ggn'; use products='autograd'",
        )
        model = bare(model)
        self.names, self.params = selected(model, loss_fn, params)
        self.mode: Literal["eval", "train"] = mode
        self.curvature: Kind = curvature
        self.memory = free_bytes(self.params[0].device) // 2 if memory is None else parse_bytes(memory)
        self._ranks = Ranks(process_group, self.params[0].device) if process_group is not None else None
        if self._ranks:
            self.memory = int(self._ranks.least(self.memory))  # sizes that follow from it must agree
        self._loss_fn, self._data = loss_fn, data
        self._losses = Losses(model, loss_fn, data, self.params, mode)
        with self._losses.neutral():
            self._losses.probe(PROBE)
        self._how = products
        self._operator: Any = None
        self._differences: Differences | None = None
        self._state: list[tuple[Any, ...]] = []
        self._moments: dict[str, tuple[list[tuple[Any, ...]], Samples]] = {}

    def restricted(self, params: str | Iterable[str] | Iterable[nn.Parameter]) -> Self:
        """The diagonal block of some of the parameters, arguments as of the constructor."""
        return type(self)(
            self._losses.model,
            self._loss_fn,
            self._data,
            params=params,
            curvature=self.curvature,
            memory=self.memory,
            mode=self.mode,
            process_group=self._ranks.group if self._ranks else None,
            products=self._how,
        )

    def gradient(self) -> Tensor:
        """The gradient of the mean loss: (p,)."""
        return self.moved().gradient()

    @property
    def model(self) -> nn.Module:
        """The module whose loss is measured, without wrappers."""
        return self._losses.model

    @property
    def data(self) -> Data:
        """What the loss is averaged over."""
        data: Data = self._losses.data
        return data

    @property
    def sum(self) -> Callable[[Tensor], None] | None:
        """Sums a tensor over all processes, in place; None where there is one."""
        return self._ranks.sum if self._ranks else None

    def moved(self) -> Moved:
        """The loss at other weights."""
        with self.products():  # which cuts the data into chunks that fit
            losses = self._losses.again()
            losses.cut(self._losses.chunk)
        return Moved(losses, self._ranks, self._explained)

    def sample_slopes(self, v: Tensor) -> Tensor:
        """g_i . v of each sample's loss gradient, for the samples of this process: (samples,) in float64."""
        require(self.curvature == "hessian", "slopes of samples need curvature='hessian', got 'ggn'")
        with self.sample_products("sample") as moments:
            slopes: Tensor = moments.slopes(v)
        return self._slopes_one_by_one(v) if slopes.isnan().all() else slopes

    def _slopes_one_by_one(self, v: Tensor) -> Tensor:
        """Of a model without a per-sample rule."""
        losses, slopes, weights = self._losses.again(), list[Tensor](), 0.0
        with self._explained():
            losses.cut(losses.chunk, single=True)
            losses.rewind(0)
            while (batch := losses.next_batch()) is not End:
                total, weight = losses.total(batch)
                slopes.append(flat_gradient(total, self.params).double().dot(v.double()))
                weights += weight
        return torch.stack(slopes) * (len(slopes) / weights)

    @contextmanager
    def separately(self) -> Iterator[Curves]:
        """Graphs of batches of any size beside those of the data, for use within. Raises UsageError in a group."""
        require(self._ranks is None, "batches of any size need one process, got several that share the data")
        with self._explained():
            yield Curves(compiled(), self._losses.again(), self.curvature)

    def check_exact(self, what: str) -> None:
        """Raise UsageError where products are not those of autograd."""
        require(self._how == "autograd", f"products must be 'autograd' for {what}, got 'finite-difference'")

    def footprint(self, k: int = 1) -> Footprint:
        """The memory that k eigenvalues will take, after one product, which builds the graphs.

        The weights themselves are there already. `memory` bounds basis and graphs; a batch's graph comes on top.
        """
        vector = self.shape[0] * self.params[0].element_size()
        with self.products() as operator:
            operator.apply(torch.zeros(self.shape[0], dtype=self.params[0].dtype, device=self.params[0].device))
            graphs = 0 if self._differences is not None else int(operator.kept_bytes)
        basis = min(self.shape[0], max(self.basis(k), 2 * k + 2))
        return Footprint(basis=(basis + 1) * vector, products=_IN_FLIGHT * vector, graphs=graphs)

    def moment_operator(self, order: int, unit: Unit = "sample") -> MomentOperator:
        """M_order - H^order, with the interface of this one."""
        require(isinstance(order, int) and order >= 1, f"order must be >= 1, got {order}")
        return MomentOperator(self, order, unit)

    @property
    def _spread(self) -> bool:
        """Whether the parameters are on several devices."""
        return len({p.device for p in self.params}) > 1

    def samples(self, unit: Unit) -> Samples:
        """The per-sample Hessians at the model's present weights."""
        require(unit in ("sample", "batch"), f"unit must be 'sample' or 'batch', got {unit!r}")
        require(
            self._how == "autograd",
            "moments of samples need products='autograd', got 'finite-difference'",
        )
        require(not self._spread, "moments of samples need all parameters on one device, got several")
        require(
            unit == "sample" or not is_pair(self._data),
            "unit='batch' needs data in batches, got a pair of tensors; pass list(zip(x.split(128), y.split(128)))",
        )
        with self._explained():
            return self._current_samples(unit)

    def _current_samples(self, unit: Unit) -> Samples:
        state = self._losses.state()
        known, samples = self._moments.get(unit, (None, None))
        if samples is None or known != state:
            self._moments.pop(unit, None)
            samples = Samples(compiled(), self._losses.again(), self.memory, unit, self.curvature, self.sum)
            self._moments[unit] = state, samples
        return samples

    @contextmanager
    def sample_products(self, unit: Unit) -> Iterator[Any]:
        """The compiled moments of the per-sample Hessians, for use within."""
        moments = self.samples(unit).operator
        with self._explained():
            yield moments
        _check_steady(moments)

    def gradient_seconds(self) -> float:
        """Seconds of a full gradient."""
        if self._differences is not None:
            return self._differences.gradient_seconds
        return float(self._operator.build_seconds) if self._operator is not None else 0.0

    def precision(self) -> float:
        """The relative error of a product where that is more than rounding, else 0."""
        if self._how == "autograd":
            return 0.0
        with self.products():
            assert self._differences is not None
            return self._differences.precision

    def product_errors(self, vectors: Tensor) -> list[float]:
        """How far the product of each row is from the truth, where that is more than rounding."""
        if self._how == "autograd":
            return super().product_errors(vectors)
        with self.products():
            assert self._differences is not None
            return [self._differences.error(v) for v in vectors]

    @contextmanager
    def products(self) -> Iterator[Any]:
        """The compiled operator, for use within."""
        with self._explained():
            operator = self._current()
            yield operator
        if self._differences is None:
            _check_steady(operator)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Keep what is switched on around out of the products inside, and explain what goes wrong in one."""
        try:
            with self._losses.neutral(), usage_errors():
                yield
        except RuntimeError as error:
            raise self._explain(error) from error

    def _current(self) -> Any:
        """The operator at the model's present weights: graphs of earlier weights are let go."""
        state = self._losses.state()
        if self._operator is None or state != self._state:
            self._operator, losses = None, self._losses
            if self._how == "finite-difference":
                require(
                    not self._spread, "products='finite-difference' needs all parameters on one device, got several"
                )
                self._differences = Differences(losses, self._ranks, self.memory)
                like = self.params[0].detach()
                self._operator = compiled().Callable(self._differences, like, self.shape[0])
                self._state = state
                return self._operator
            if self._ranks and self._ranks.least(-float(losses.coupled)) < 0:
                raise UsageError(
                    "a loss whose samples depend on each other needs data in batches to be shared by processes, got a "
                    "pair of tensors; pass batches"
                )
            curves = Curves(compiled(), losses, self.curvature)

            def graph() -> tuple[Any, Tensor, float, int] | None:
                batch = losses.next_batch()
                if batch is End:
                    return None
                curvature, total, weight = curves.whole(batch)
                return curvature, total, weight, curves.bytes(batch, curvature)

            operator = compiled().Hessian(self.params, losses.rewind, graph, self.memory, self.sum)
            if losses.divisible:  # as many rows a chunk as have a graph within the memory
                losses.fit(lambda batch: curves.bytes(batch, curves.whole(batch)[0]), self.memory)
            self._operator, self._state = operator, state
        return self._operator

    def _explain(self, error: RuntimeError) -> Exception:
        """Names the parameter behind an operation that cannot be differentiated twice."""
        if not re.search(r"derivative for|not implemented|double backward|differentiate twice", str(error)):
            return error
        self._losses.rewind(0)
        total, _ = self._losses.total(self._losses.next_batch())
        for name, param in zip(self.names, self.params, strict=True):
            try:
                (gradient,) = torch.autograd.grad(
                    total, [param], create_graph=True, retain_graph=True, allow_unused=True
                )
                if gradient is not None and gradient.requires_grad:
                    compiled().check_differentiable([gradient])
                    torch.autograd.grad(gradient.sum(), self.params, retain_graph=True, allow_unused=True)
            except RuntimeError as culprit:
                reason = str(culprit).splitlines()[0]
                return UsageError(
                    f"the loss must be twice differentiable, got an operation behind {name} that is not ({reason}); "
                    "use products='finite-difference', or leave the parameter out with params="
                )
        return error


class OfMoments(Operator):
    """What is made of the moments of a model's present weights."""

    def __init__(self, hessian: HessianProducts, unit: Unit) -> None:
        self.names, self.params, self.memory = hessian.names, hessian.params, hessian.memory
        self.unit = unit
        self._hessian = hessian

    def compose(self, moments: Any) -> Any:
        """The compiled operator."""
        raise NotImplementedError

    @contextmanager
    def products(self) -> Iterator[Any]:
        """The compiled operator, for use within."""
        with self._hessian.sample_products(self.unit) as moments:
            yield self.compose(moments)

    def gradient_seconds(self) -> float:
        """Seconds of a full gradient."""
        return self._hessian.gradient_seconds() or float(self._hessian.samples(self.unit).operator.build_seconds)


class MomentOperator(OfMoments):
    """M_k - H^k of the Hessians of samples (or batches), at the model's present weights."""

    def __init__(self, hessian: HessianProducts, order: int, unit: Unit) -> None:
        super().__init__(hessian, unit)
        self.order = order

    def compose(self, moments: Any) -> Any:
        return compiled().Centred(moments, self.order)


def _check_steady(operator: Any) -> None:
    """Raise UsageError where the loss was not the same function at every pass."""
    drift = operator.drift()
    require(
        drift < 1e-4,
        "data and loss_fn must give the same batches and losses at every pass, got a loss that changed by "
        f"{drift:.1e} of itself; switch off shuffling, sampling and augmentation",
    )
