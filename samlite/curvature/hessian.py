"""The Hessian of a model's mean loss over a data set, as a matrix-free operator, and its eigenvalues.

Products are exact double backward through graphs that are kept while memory allows; eigenvalues come from
`samlite._C` with an error bound each. The Hessian is that of the loss alone: weight decay and other penalties of a
training loop are not in it. Where the loss has kinks (ReLU, max-pool) it is the Hessian almost everywhere, as autograd
defines it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from samlite.batches import is_pair
from samlite.curvature.function import PROBE, Data, End, Loss, Losses
from samlite.curvature.gauss_newton import Curves, Kind
from samlite.curvature.memory import free_bytes, parse_bytes
from samlite.curvature.moments import Moments, OfMoments, Samples, Unit, moments
from samlite.curvature.operator import Operator, Progress, check_steady, compiled, require
from samlite.curvature.sharpness import Block, Sharpness, blocks, sharpness
from samlite.curvature.stability import Stability, stability
from samlite.curvature.untouched import check_real
from samlite.distributed import Ranks
from samlite.errors import UsageError


class Hessian(Operator):
    """H = (1/n) sum_i of the second derivatives of sample i's loss by the parameters: ``h @ v``, ``h.eigenvalues()``.

    The measurement is the same whatever is switched on around it (no_grad, inference mode, autocast, anomaly mode), and
    sees neither hooks on gradients nor checkpointing nor compilation. Transforms of torch.func and fake tensors are
    refused.

    Args:
        model: any module; of a wrapper that compiles it or distributes its training, the module inside. It is left as
            it was found: weights, gradients, modes, buffers, plain attributes, random state.
        loss_fn: a loss module, taken as criterion(model(inputs), targets) with its own denominator
            (ignore_index, class weights); or ``loss_fn(model, batch)`` that returns the mean loss over the batch, or
            (mean loss, weight) where its denominator is not the number of samples.
        data: an (inputs, targets) pair of tensors, or a re-iterable of batches, the same at every pass: tensors in
            containers of any kind (see ``samlite.batches``). Batches of unequal size count by their samples. A pair
            whose samples depend on each other through the loss (contrastive, pairwise) is one batch.
        params: which parameters, as name patterns (``"layer3.*"``) or tensors; default all of the model that require a
            gradient. Those of a loss module are named ``criterion.NAME``.
        curvature: "hessian", or "ggn" for its Gauss-Newton part: see ``samlite.curvature``.
        memory: bytes (or "2GB") that kept graphs may take; default half of what is free. Beyond it graphs are built
            anew at every product, with the same results. The graph of one batch comes on top.
        mode: "eval", or "train" for the function with batch statistics.
        process_group: of ``torch.distributed``, whose processes each hold a part of the data and the same weights:
            every result is that of all the data together, the same on every process, and all must call the same
            methods. Every product is summed over the processes once. Memory is what the one with the least has.

    Raises:
        UsageError: an argument is not usable; the line names it, the rule and the fix.
    """

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
    ) -> None:
        check_real()
        if not isinstance(model, nn.Module):
            raise UsageError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        require(mode in ("eval", "train"), f"mode must be 'eval' or 'train', got {mode!r}")
        require(curvature in ("hessian", "ggn"), f"curvature must be 'hessian' or 'ggn', got {curvature!r}")
        model = _bare(model)
        self.names, self.params = _selected(model, loss_fn, params)
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
            UsageError: samples depend on each other (batch norm with batch statistics), or are not told apart.
        """
        require(isinstance(order, int) and 2 <= order <= 8, f"order must be between 2 and 8, got {order}")
        return moments(self, order, unit, tol, seed, progress)

    def stability(
        self,
        lr: float,
        rho: float = 0.0,
        unit: Unit = "sample",
        *,
        tol: float = 1e-3,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Stability:
        """Whether SGD (rho = 0) or unnormalised SAM stays at this minimum, one sample (or batch) a step.

        Where the loss is not squared error, its Hessian is rarely free of negative eigenvalues: measure with
        ``curvature="ggn"``.

        Args:
            tol: relative error of `max_lr`. Eigenvalues are found to tol/1000 of the largest one of their matrix:
                directions that matter less than that are not seen, unless the Krylov space spans them all.

        Raises:
            UsageError: as of `moments`.
        """
        require(0 < lr < math.inf, f"lr must be > 0, got {lr}")
        require(0 <= rho < math.inf, f"rho must be >= 0, got {rho}")
        require(0 < tol < 1, f"tol must be between 0 and 1, got {tol}")
        return stability(self, lr, rho, unit, tol, seed, progress)

    def sharpness(self, tol: float = 0.05, *, seed: int = 0, progress: Progress | None = None) -> Sharpness:
        """Worst-, ascent- and average-direction sharpness; `tol` is that of the trace.

        Raises:
            UsageError: as of `moments`.
        """
        return sharpness(self, tol, seed, progress)

    def blocks(
        self, k: int = 1, tol: float = 0.05, *, seed: int = 0, progress: Progress | None = None
    ) -> dict[str, Block]:
        """The k largest eigenvalues and the trace of each layer's own block, by the layer's name.

        A layer is what shares the name before the last dot. Blocks are measured one by one, so that memory is that of
        one.
        """
        require(isinstance(k, int) and k >= 1, f"k must be >= 1, got {k}")
        return blocks(self, k, tol, seed, progress)

    def restricted(self, params: str | Iterable[str] | Iterable[nn.Parameter]) -> Hessian:
        """The diagonal block of some of the parameters, arguments as of the constructor."""
        return Hessian(
            self._losses.model,
            self._loss_fn,
            self._data,
            params=params,
            curvature=self.curvature,
            memory=self.memory,
            mode=self.mode,
            process_group=self._ranks.group if self._ranks else None,
        )

    def gradient(self) -> Tensor:
        """The gradient of the mean loss: (p,)."""
        with self._products():  # which also cuts the data into chunks that fit
            sums, weights = torch.cat([torch.zeros_like(p).reshape(-1) for p in self.params]), 0.0
            self._losses.rewind(0)
            while (batch := self._losses.next_batch()) is not End:
                total, weight = self._losses.total(batch)
                weights += weight
                if total.requires_grad:
                    parts = torch.autograd.grad(total, self.params, allow_unused=True, materialize_grads=True)
                    sums += torch.cat([part.reshape(-1) for part in parts])
            if self._ranks:
                self._ranks.sum(sums)
                weights = self._ranks.total(weights)
            return sums / weights

    def moment_operator(self, order: int, unit: Unit = "sample") -> MomentOperator:
        """M_order - H^order, with the interface of this one."""
        require(isinstance(order, int) and order >= 1, f"order must be >= 1, got {order}")
        return MomentOperator(self, order, unit)

    @property
    def _sum(self) -> Callable[[Tensor], None] | None:
        return self._ranks.sum if self._ranks else None

    def _samples(self, unit: Unit) -> Samples:
        """The per-sample Hessians at the model's present weights."""
        require(unit in ("sample", "batch"), f"unit must be 'sample' or 'batch', got {unit!r}")
        require(
            unit == "sample" or not is_pair(self._data),
            "unit='batch' needs data in batches, got a pair of tensors; pass list(zip(x.split(128), y.split(128)))",
        )
        try:
            with self._losses.neutral():
                return self._samples_now(unit)
        except RuntimeError as error:
            raise self._explained(error) from error

    def _samples_now(self, unit: Unit) -> Samples:
        state = self._losses.state()
        known, samples = self._moments.get(unit, (None, None))
        if samples is None or known != state:
            self._moments.pop(unit, None)
            samples = Samples(compiled(), self._losses.again(), self.memory, unit, self.curvature, self._sum)
            self._moments[unit] = state, samples
        return samples

    def _gradient_seconds(self) -> float:
        return float(self._operator.build_seconds) if self._operator is not None else 0.0

    @contextmanager
    def _products(self) -> Iterator[Any]:
        """The compiled operator, exact and checked: what goes wrong in a product is raised with its reason."""
        try:
            with self._losses.neutral():
                operator = self._current()
                yield operator
        except RuntimeError as error:
            raise self._explained(error) from error
        except UsageError:
            raise
        except ValueError as error:  # by the compiled module
            raise UsageError(str(error)) from error
        check_steady(operator)

    def _current(self) -> Any:
        """The operator at the model's present weights: graphs of earlier weights are let go."""
        state = self._losses.state()
        if self._operator is None or state != self._state:
            self._operator, losses = None, self._losses
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

            operator = compiled().Hessian(self.params, losses.rewind, graph, self.memory, self._sum)
            if losses.divisible:  # as many rows a chunk as have a graph within the memory
                losses.fit(lambda batch: curves.bytes(batch, curves.whole(batch)[0]), self.memory)
            self._operator, self._state = operator, state
        return self._operator

    def _explained(self, error: RuntimeError) -> Exception:
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
                return ValueError(
                    f"the loss must be twice differentiable, got an operation behind {name} that is not ({reason}); "
                    "replace the operation, or leave the parameter out with params="
                )
        return error


class MomentOperator(OfMoments):
    """M_k - H^k of the Hessians of samples (or batches), at the model's present weights."""

    def __init__(self, hessian: Hessian, order: int, unit: Unit) -> None:
        super().__init__(hessian, unit)
        self.order = order

    def _made_of(self, moments: Any) -> Any:
        return compiled().Centred(moments, self.order)


def _bare(model: nn.Module) -> nn.Module:
    """The module inside wrappers that compile it or train it on several devices."""
    while True:
        if isinstance(model, DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner  # of torch.compile
        else:
            return model


def _check_values(name: str, p: Tensor) -> None:
    """Raise UsageError unless a parameter is a plain tensor with values."""
    rule = f"parameters must be plain tensors with values, got {name}"
    require(not is_lazy(p), f"{rule} not initialised yet; run the model once")
    require(p.device.type != "meta", f"{rule} on the meta device; load the weights first")
    require(
        not p.is_inference(), f"{rule} made in inference mode, which autograd cannot use; copy the model outside it"
    )
    kind = type(p.data).__name__
    require(kind != "FakeTensor", f"{rule} as a FakeTensor; measure the real model")
    require(
        kind != "DTensor" and not hasattr(p, "_is_flat_param") and kind != "FlatParameter",
        f"{rule} in shards (FSDP or tensor parallel); load the full state_dict into a model that is not wrapped",
    )


def _selected(
    model: nn.Module, loss_fn: Any, params: str | Iterable[str] | Iterable[nn.Parameter] | None
) -> tuple[list[str], list[nn.Parameter]]:
    """Names and parameters to measure, each tied one once. Those of a loss module are named criterion.NAME."""
    named = dict(model.named_parameters(remove_duplicate=False))
    for name, p in named.items():
        _check_values(name, p)
    if params is not None and isinstance(loss_fn, nn.Module):
        own = {id(p) for p in named.values()}
        named |= {f"criterion.{name}": p for name, p in loss_fn.named_parameters() if id(p) not in own}
    if params is None:
        chosen = {name: p for name, p in named.items() if p.requires_grad}
        require(bool(chosen), "model must have parameters that require a gradient, got none")
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
            require(
                any(fnmatchcase(name, pattern) for name in named),
                f"params must match parameter names, got {pattern!r}; the model has {known}",
            )
        require(
            bool(chosen) and tensors <= {id(p) for p in chosen.values()},
            f"params must be parameters of the model or patterns of their names; the model has {known}",
        )
        frozen = [name for name, p in chosen.items() if not p.requires_grad]
        if tensors or len(frozen) == len(chosen):
            require(not frozen, f"params must require a gradient, got {', '.join(frozen)} without")
        chosen = {name: p for name, p in chosen.items() if p.requires_grad}
    unique: dict[int, tuple[str, nn.Parameter]] = {}
    for name, p in chosen.items():
        unique.setdefault(id(p), (name, p))
    names, parameters = [name for name, _ in unique.values()], [p for _, p in unique.values()]
    kinds = {(p.dtype, p.device) for p in parameters}
    require(
        len(kinds) == 1 and parameters[0].dtype in (torch.float32, torch.float64),
        "the measured parameters must all be float32, or all float64, on one device, got "
        + ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds)),
    )
    broken = [name for name, p in zip(names, parameters, strict=True) if not p.detach().isfinite().all()]
    require(not broken, f"the weights must be finite, got nan or inf in {', '.join(broken)}")
    return names, parameters
