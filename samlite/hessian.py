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

from samlite.curvature import Curves, Kind
from samlite.losses import PROBE, Data, Loss, Losses, full_precision, is_pair
from samlite.moments import Moments, OfMoments, Samples, Unit, moments
from samlite.operator import Operator, Progress, check_steady, compiled, require
from samlite.ranks import Ranks
from samlite.sharpness import Block, Sharpness, blocks, sharpness
from samlite.stability import Stability, stability


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
        curvature: "hessian", or "ggn" for its Gauss-Newton part: see ``samlite.curvature``.
        memory: bytes (or "2GB") that kept graphs may take; default half of what is free. Beyond it graphs are built
            anew at every product, with the same results.
        mode: "eval", or "train" for the function with batch statistics.
        process_group: of ``torch.distributed``, whose processes each hold a part of the data and the same weights:
            every result is that of all the data together, the same on every process, and all must call the same
            methods. Every product is summed over the processes once. Memory is what the one with the least has.

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
        curvature: Kind = "hessian",
        memory: int | str | None = None,
        mode: Literal["eval", "train"] = "eval",
        process_group: Any = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        require(mode in ("eval", "train"), f"mode must be 'eval' or 'train', got {mode!r}")
        require(curvature in ("hessian", "ggn"), f"curvature must be 'hessian' or 'ggn', got {curvature!r}")
        model = getattr(model, "_orig_mod", model)  # compiled graphs have no second derivative
        self.names, self.params = _selected(model, params)
        self.mode: Literal["eval", "train"] = mode
        self.curvature: Kind = curvature
        self.memory = _free_memory(self.params[0].device) // 2 if memory is None else _bytes(memory)
        self._ranks = Ranks(process_group, self.params[0].device) if process_group is not None else None
        if self._ranks:
            self.memory = int(self._ranks.least(self.memory))  # sizes that follow from it must agree
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
            ValueError: as of `moments`.
        """
        require(0 < lr < math.inf, f"lr must be > 0, got {lr}")
        require(0 <= rho < math.inf, f"rho must be >= 0, got {rho}")
        require(0 < tol < 1, f"tol must be between 0 and 1, got {tol}")
        return stability(self, lr, rho, unit, tol, seed, progress)

    def sharpness(self, tol: float = 0.05, *, seed: int = 0, progress: Progress | None = None) -> Sharpness:
        """Worst-, ascent- and average-direction sharpness; `tol` is that of the trace.

        Raises:
            ValueError: as of `moments`.
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
        sums = torch.zeros(self.shape[0]).to(self.params[0])
        weights = 0.0
        with self._products():  # which also cuts the data into chunks that fit
            self._losses.rewind(0)
            while (batch := self._losses.next_batch()) is not None:
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
        state = _fingerprint(self._losses.model)
        known, samples = self._moments.get(unit, (None, None))
        if samples is None or known != state:
            self._moments.pop(unit, None)
            losses = Losses(self._losses.model, self._loss_fn, self._data, self.params, self.mode)
            with full_precision():
                samples = Samples(compiled(), losses, self.memory, unit, self.curvature, self._sum)
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
        check_steady(operator)

    def _current(self) -> Any:
        """The operator at the model's present weights: graphs of earlier weights are let go."""
        state = _fingerprint(self._losses.model)
        if self._operator is None or state != self._state:
            self._operator, losses = None, self._losses
            curves = Curves(compiled(), losses, self.curvature)

            def graph() -> tuple[Any, Tensor, float] | None:
                batch = losses.next_batch()
                return None if batch is None else curves.whole(batch)

            operator = compiled().Hessian(self.params, losses.rewind, graph, self.memory, self._sum)
            if losses.chunk and self.mode == "eval":  # as many rows a chunk as have a graph within the memory
                losses.fit(operator.measure, self.memory)
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


def _selected(
    model: nn.Module, params: str | Iterable[str] | Iterable[nn.Parameter] | None
) -> tuple[list[str], list[nn.Parameter]]:
    """Names and parameters to measure, each tied one once."""
    named = dict(model.named_parameters(remove_duplicate=False))
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
    broken = [name for name, p in zip(names, parameters, strict=True) if not p.isfinite().all()]
    require(not broken, f"the weights must be finite, got nan or inf in {', '.join(broken)}")
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
    require(match is not None, f"memory must be bytes or a size such as '2GB', got {memory!r}")
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
