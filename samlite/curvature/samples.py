"""The Hessians of single samples (or of batches), and their products with vectors for all samples at once.

`samlite._C` carries H_i^k v for all samples in factored form (see ``cpp/moments.h``), from layers that
`samlite.curvature.capture` records. Where that does not do for a model, every sample gets its own copy of the weights,
or is measured by itself: exact as well, and slow, with a warning that names the reason.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from samlite.batches import Form, form, leaves, mapped, owners, rows, samples
from samlite.curvature.capture.plan import Plan, Scaled, Seen, UncoveredError, find_plan, find_scaled
from samlite.curvature.capture.recorder import Capture
from samlite.curvature.function import Losses
from samlite.curvature.gauss_newton import Curves, Kind
from samlite.curvature.stream import End
from samlite.errors import UsageError

if TYPE_CHECKING:
    from types import ModuleType

Unit = Literal["sample", "batch"]

_MORE, _FEWER = 3, 2  # samples that are looked at to find where samples are
_AGREEMENT = {torch.float32: 5e-2, torch.float64: 1e-9}  # of a chain and plain autograd on them, relative


class Samples:
    """The per-sample (or per-batch) Hessians of a data set, at the present weights.

    Args:
        losses: the data set; its own cut is used.
        memory: bytes that the kept graphs may take.
        unit: "sample", or "batch" for each batch as one.
        kind: of curvature.
        sum: of a tensor over processes, in place, where each has a part of the data.
    """

    def __init__(
        self,
        module: ModuleType,
        losses: Losses,
        memory: int,
        unit: Unit,
        kind: Kind,
        sum: Callable[[Tensor], None] | None = None,
    ) -> None:
        self._c, self._losses, self._unit = module, losses, unit
        self._curves = Curves(module, losses, kind)
        self.fallback: str | None = None
        self._plans: dict[Form, Plan] = {}
        if unit == "sample":
            self._plan()
        try:
            self.operator = self._prepared(memory, sum)
        except UncoveredError as reason:  # of a batch that is unlike the few samples that were looked at
            self._plans, self.fallback = {}, str(reason)
            self._warn("every sample is measured by itself")
            self.operator = self._prepared(memory, sum)

    def _prepared(self, memory: int, sum: Callable[[Tensor], None] | None) -> Any:
        """The compiled moments, with the losses at a suitable scale."""
        losses, self._exponent = self._losses, 0
        operator = self._moments(memory, sum)
        if self._plans and losses.divisible:
            losses.fit(self._step_bytes, memory)
        else:  # also forgets the probes
            losses.cut(losses.chunk, single=self._unit == "sample" and not self._plans)
        while (exponent := operator.suitable_exponent()) != self._exponent:
            self._exponent = exponent
            operator = self._moments(memory, sum)
        return operator

    def _plan(self) -> None:
        """Choose how samples are taken apart, and warn where that is slow."""
        try:
            self._plans = self._checked_plans()
            return
        except UncoveredError as reason:
            self.fallback = str(reason)
        way = "every sample has its own copy of the weights"
        try:
            self._plans = self._checked_plans(lift=True)
        except UncoveredError:
            for _, few in self._forms():
                self._check_apart(few)
            way = "every sample is measured by itself"
        self._warn(way)

    def _warn(self, way: str) -> None:
        warnings.warn(f"no per-sample rule for {self.fallback}: {way}, exactly but slowly", stacklevel=7)

    def _moments(self, memory: int, sum: Callable[[Tensor], None] | None) -> Any:
        """The compiled moments, of losses over 2^exponent."""
        return self._c.Moments(
            self._losses.parameters,
            self._losses.rewind,
            self._next,
            batches=self._unit == "batch",
            memory=memory,
            exponent=self._exponent,
            sum=sum,
        )

    def _next(self) -> tuple[Any, Tensor, float, int] | None:
        batch = self._losses.next_batch()
        if batch is End:
            return None
        powers, total, weight = self._powers(batch)
        return powers, total, weight, self._curves.bytes(batch, powers)

    def _powers(self, batch: Any) -> tuple[Any, Tensor, float]:
        if not self._plans:
            return _whole(self._c, self._curves, batch, self._unit == "batch", self._exponent)
        return _chain(self._c, self._curves, batch, self._plans[form(batch)], self._exponent)

    def _step_bytes(self, batch: Any) -> int:
        """Memory of a batch's graph and of a step through it."""
        powers = self._powers(batch)[0]
        return self._curves.bytes(batch, powers) + int(powers.step_bytes())

    # --- The plans, and the proof that they are right

    def _checked_plans(self, lift: bool = False) -> dict[Form, Plan]:
        """Where samples are in each layer, by the form of the batch.

        A recurrent network has more layers in longer sequences. Each plan is checked on a few samples against plain
        autograd.
        """
        plans: dict[Form, Plan] = {}
        for kind, few in self._forms():
            known = next((plan for plan in plans.values() if self._suits(plan, few)), None)
            plan = known or self._found(few, lift)
            self._check_apart(few)
            if known is None:
                self._check(few, plan)
            plans[kind] = plan
        return plans

    def _suits(self, plan: Plan, few: Any) -> bool:
        try:
            return plan.suits(self._seen(few, plan.scaled, plan.lift))
        except UncoveredError:
            return False

    def _found(self, few: Any, lift: bool) -> Plan:
        fewer = rows(few, slice(0, _FEWER))
        scaled = find_scaled(self._seen(few), self._seen(fewer))
        changed = [self._seen(_changed(few, j), scaled, lift) for j in range(samples(few))]
        plan = find_plan(scaled, self._seen(few, scaled, lift), self._seen(fewer, scaled, lift), changed)
        return replace(plan, lift=lift)

    def _forms(self) -> Iterator[tuple[Form, Any]]:
        """Every form of batch in the data, with a few samples of it."""
        seen = set()
        self._losses.rewind(0)
        while (batch := self._losses.next_batch()) is not End:
            if (kind := form(batch)) not in seen:
                seen.add(kind)
                yield kind, _few(batch)

    def _check_apart(self, few: Any) -> None:
        """Raise UsageError where samples depend on each other: there are no Hessians of single samples then."""
        singles = [slice(i, i + 1) for i in range(samples(few))]
        if self._losses.coupled or (len(singles) > 1 and self._losses.couples(few, singles)):
            raise UsageError(
                "moments need samples that do not depend on each other, got a loss of a batch that is not the mean of "
                "the losses of its samples; return (mean loss, weight) where it divides by something else than their "
                "number, or pass data in batches and use unit='batch'"
            )

    def _seen(self, batch: Any, scaled: list[Scaled] | None = None, lift: bool = False) -> Seen:
        capture = Capture(self._losses.parameters, samples(batch), scaled, lift=lift, owners=owners(batch))
        self._losses.forget()
        with torch.no_grad():
            self._losses.total(batch, capture)
        return capture.seen

    def _check(self, batch: Any, plan: Plan) -> None:
        """Raise UncoveredError unless the chains of some samples are what plain autograd gives for each of them."""
        try:  # in float64, as little but rounding is left of samples that are fitted well
            doubled = Curves(self._c, self._losses.doubled(), self._curves.kind)
            agree = _agree(self._c, doubled, batch, plan)
        except (RuntimeError, TypeError):  # a model that cannot be copied, a loss that holds float32 tensors, mps
            agree = _agree(self._c, self._curves, batch, plan)
        if not agree:
            raise UncoveredError("this model: its chains disagree with plain autograd")


def _whole(c: ModuleType, curves: Curves, batch: Any, mean: bool, exponent: int = 0) -> tuple[Any, Tensor, float]:
    curvature, total, weight = curves.whole(batch)
    return c.batch_hessian(curvature, weight, mean, curves.losses.parameters, exponent), total, weight


def _chain(c: ModuleType, curves: Curves, batch: Any, plan: Plan, exponent: int = 0) -> tuple[Any, Tensor, float]:
    count, params = samples(batch), curves.losses.parameters
    taps = curves.kind == "hessian"
    capture = Capture(params, count, plan=plan, taps=taps, lift=plan.lift, owners=owners(batch))
    total, weight, outputs, leaves = curves.total(batch, capture)
    with torch.enable_grad():
        scaled = total * 2.0**-exponent if exponent else total
    return c.chain(scaled, capture.sites, count, params, outputs, leaves), total.detach(), weight


def _agree(c: ModuleType, curves: Curves, batch: Any, plan: Plan) -> bool:
    like = curves.losses.parameters[0]
    generator = torch.Generator(device="cpu").manual_seed(0)
    v = torch.randn(
        sum(p.numel() for p in curves.losses.parameters), generator=generator, dtype=torch.float32, device="cpu"
    )
    v = v.to(like.device, like.dtype)

    def plain(order: int, exponent: int = 0) -> Tensor:  # (samples, order, p)
        each = []
        for i in range(samples(batch)):
            curves.losses.forget()
            each.append(_whole(c, curves, rows(batch, slice(i, i + 1)), False, exponent)[0](v, order))
        return torch.stack(each)

    size = float(plain(1).abs().max())
    if not math.isfinite(size):
        return True  # which the first product says
    exponent = math.frexp(size)[1]
    curves.losses.forget()
    chain, right = _chain(c, curves, batch, plan, exponent)[0](v, 2), plain(2, exponent)
    allowed = _AGREEMENT[like.dtype] * right.norm(dim=2).sum(0)
    return bool(((chain - right.sum(0)).norm(dim=1) <= allowed).all())


def _few(batch: Any) -> Any:
    """A few samples of a batch, one again and again where it has fewer."""
    rule = "moments need batches with one row a sample in every tensor; give one sample a batch and use unit='batch'"
    if _holds_packed(batch):
        raise UsageError(f"{rule} (got a PackedSequence)")
    try:
        return rows(batch, [i % samples(batch) for i in range(_MORE)])
    except UsageError as error:
        raise UsageError(f"{rule} ({error})") from error


def _holds_packed(batch: Any) -> bool:
    return any(isinstance(part, PackedSequence) for part in leaves(batch))


def _changed(batch: Any, j: int) -> Any:
    """The batch with sample j replaced by its neighbour, its numbers scaled."""

    of_rows = owners(batch)

    def changed(part: Any) -> Any:
        if not isinstance(part, Tensor) or part.dim() == 0:
            return part
        if of_rows:  # graphs keep their edges; what floats of a node, an edge or a graph changes
            kinds = [kind for kind in of_rows.values() if len(kind) == len(part)]
            owner = kinds[0] if kinds else torch.arange(len(part), device=part.device)
            if not part.is_floating_point() or (not kinds and len(part) != samples(batch)):
                return part
            return torch.where((owner == j).view(-1, *[1] * (part.dim() - 1)), 1.37 * part + 0.1, part)
        other = part.clone()
        other[j] = part[(j + 1) % len(part)]
        if part.is_floating_point():
            other[j] *= 1.37
        return other

    return mapped(changed, batch)
