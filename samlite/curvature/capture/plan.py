"""Where the samples are in a forward pass: found by passes over other numbers of samples, and over changed ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_EVEN = ("alone", "inner", "outer")
Layout = tuple[int, int, int, int]  # dimension of the samples, and its size as outer * samples * inner


class UncoveredError(Exception):
    """A parameter is used in a way that has no per-sample rule here."""


@dataclass(frozen=True)
class Call:
    """A call of a function of torch: of each argument and each result a shape, an integer, or None for the rest."""

    arguments: list[Any]
    results: list[Any]


@dataclass(frozen=True)
class Scaled:
    """What grows with the number of samples in a call: dimensions of tensors, and integers (True); else None."""

    arguments: list[int | bool | None]
    results: list[int | bool | None]


@dataclass(frozen=True)
class Probe:
    """A tensor as it was, to find out where its samples are."""

    value: Tensor
    constant: bool = False  # the same for all samples


@dataclass(frozen=True)
class Seen:
    """What was seen of a forward pass."""

    samples: int
    calls: list[Call]
    probes: list[Probe]
    owners: Mapping[str, Tensor] = field(default_factory=dict)
    """Of a batch with graphs, the sample of each of its rows, by what rows are: see `batches.owners`."""


@dataclass(frozen=True)
class Plan:
    """Where samples are in each call, and in each tensor that was probed.

    The place of a tensor is a dimension, and "alone" in it, or with positions "inner" or "outer", or what its rows may
    be (see `batches.owners`), with commas; None for constants.
    """

    scaled: list[Scaled]
    places: list[tuple[int, str] | None]
    lift: bool = False
    """Whether every parameter is lifted, rules or not."""

    def layout(self, probe: int, value: Tensor, samples: int) -> Layout | None:
        """Where the samples are in a tensor."""
        if probe >= len(self.places):
            raise UncoveredError("a forward pass that is another one for other samples")
        if (place := self.places[probe]) is None:
            return None
        dim, kind = place
        if kind not in _EVEN:
            return dim, 1, samples, 0
        others, rest = divmod(value.shape[dim] if dim < value.dim() else 1, samples)
        if rest or (kind == "alone" and others != 1):
            raise UncoveredError(
                f"a layer whose input of shape {tuple(value.shape)} does not show its {samples} samples"
            )
        return (dim, 1, samples, others) if kind == "inner" else (dim, others, samples, 1)

    def owner(self, probe: int, value: Tensor, owners: Mapping[str, Tensor]) -> Tensor | None:
        """The sample of each row of a tensor of which samples have unequal numbers; None of another one."""
        place = self.places[probe] if probe < len(self.places) else None
        if place is None or place[1] in _EVEN:
            return None
        size = value.shape[place[0]]
        fitting = [owners[kind] for kind in place[1].split(", ") if len(owners.get(kind, ())) == size]
        if not fitting or any(not torch.equal(fitting[0], other) for other in fitting):
            raise UncoveredError(f"a layer on shape {tuple(value.shape)} whose rows are not told to be {place[1]}")
        return fitting[0]

    def suits(self, seen: Seen) -> bool:
        """Whether this is a plan of another pass, by its sites and their shapes."""
        if len(seen.probes) != len(self.places):
            return False
        try:
            for i, probe in enumerate(seen.probes):
                self.layout(i, probe.value, seen.samples)
        except UncoveredError:
            return False
        return True


# --- What grows with the number of samples


def find_scaled(more: Seen, fewer: Seen) -> list[Scaled]:
    """What grows in each call with the number of samples, from passes over two numbers of them."""
    if len(more.calls) != len(fewer.calls):
        raise UncoveredError("a forward pass that takes other steps for other numbers of samples")
    counts = more.samples, fewer.samples
    return [
        Scaled(
            [_grown(a, b, counts) for a, b in zip(one.arguments, other.arguments, strict=False)],
            [_grown(a, b, counts) for a, b in zip(one.results, other.results, strict=False)],
        )
        for one, other in zip(more.calls, fewer.calls, strict=True)
    ]


def _grown(more: Any, fewer: Any, counts: tuple[int, int]) -> int | bool | None:
    if more == fewer or type(more) is not type(fewer):
        return None
    if isinstance(more, int):
        return True if more * counts[1] == fewer * counts[0] else None
    dims = [d for d, (a, b) in enumerate(zip(more, fewer, strict=False)) if a != b]
    grown = [d for d in dims if more[d] * counts[1] == fewer[d] * counts[0]]
    return dims[0] if len(more) == len(fewer) and len(dims) == 1 == len(grown) else AMBIGUOUS


AMBIGUOUS = -1  # several dimensions grow, or one by another factor


# --- Where the samples are


def find_plan(scaled: list[Scaled], base: Seen, fewer: Seen, changed: list[Seen]) -> Plan:
    """Where the samples are in each tensor that was probed.

    Args:
        base: a pass over a few samples.
        fewer: a pass over fewer of them.
        changed: passes after a change of sample j alone, for each j.

    Raises:
        UncoveredError: they are nowhere, such as behind an operation that mixes samples.
    """
    if any(len(other.probes) != len(base.probes) for other in (fewer, *changed)):
        raise UncoveredError("a forward pass that takes other steps for other samples")
    places: list[tuple[int, str] | None] = []
    for i, probe in enumerate(base.probes):
        name = f"a layer on shape {tuple(probe.value.shape)}"
        if any(other.probes[i].value.shape != probe.value.shape for other in changed):
            raise UncoveredError(f"{name}, which is another one for other samples")
        touched = [_differs(probe.value, other.probes[i].value) for other in changed]
        if probe.constant:
            if any(bool(mask.any()) for mask in touched):
                raise UncoveredError(f"{name} that samples share")
            places.append(None)
            continue
        dim = _grown(tuple(probe.value.shape), tuple(fewer.probes[i].value.shape), (base.samples, fewer.samples))
        if base.owners and (place := _unequal(i, base, fewer, touched)) is not None:
            places.append(place)
            continue
        if dim is None or dim == AMBIGUOUS:
            raise UncoveredError(f"{name} that does not grow with the number of samples")
        kinds = ("alone",) if probe.value.shape[dim] == base.samples else ("inner", "outer")
        fitting = [(dim, kind) for kind in kinds if _fits(dim, kind, touched)]
        if not fitting:
            raise UncoveredError(f"{name} whose samples are not apart")
        places.append(fitting[0])
    return Plan(scaled, places)


def _differs(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors differ by more than rounding: products of other numbers of rows round otherwise."""
    if not a.is_floating_point() or a.numel() == 0:
        return a != b
    return (a - b).abs() > 1e3 * torch.finfo(a.dtype).eps * a.abs().max()


def _unequal(i: int, base: Seen, fewer: Seen, touched: list[Tensor]) -> tuple[int, str] | None:
    """The place of a tensor whose rows belong to samples in unequal numbers."""
    more, less = base.probes[i].value.shape, fewer.probes[i].value.shape
    dims = [d for d, (a, b) in enumerate(zip(more, less, strict=False)) if a != b]
    if len(more) != len(less) or len(dims) != 1:
        return None
    fitting = [
        kind
        for kind, owner in base.owners.items()
        if len(owner) == more[dims[0]]
        and len(fewer.owners[kind]) == less[dims[0]]
        and not any(bool(mask.movedim(dims[0], 0)[owner != j].any()) for j, mask in enumerate(touched))
    ]
    return (dims[0], ", ".join(fitting)) if fitting else None


def _fits(dim: int, kind: str, touched: list[Tensor]) -> bool:
    """Whether only the entries of sample j changed with it."""
    samples = len(touched)
    for j, mask in enumerate(touched):
        index = torch.arange(mask.shape[dim], device=mask.device)
        owner = index // (len(index) // samples) if kind == "inner" else index % samples
        if bool(mask.movedim(dim, 0)[owner != j].any()):
            return False
    return True
