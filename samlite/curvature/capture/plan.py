"""Where the samples are in each layer of a forward pass, found by changing one of them at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Layout = tuple[int, int, int, int]  # dimension of the samples, and its size as outer * samples * inner


class UncoveredError(Exception):
    """A parameter is used in a way that has no per-sample rule here."""


@dataclass(frozen=True)
class Probe:
    """What a site looked like, to find out where its samples are."""

    value: Tensor  # input or output, as it was
    features: int  # trailing dimensions that are not positions


@dataclass(frozen=True)
class Seen:
    """What was seen of a forward pass."""

    probes: list[Probe]
    lookups: list[bool]
    """Of each embedding, whether its rows are the same for all samples."""
    samples: int


@dataclass(frozen=True)
class Plan:
    """Where the samples are at each site: in which dimension, "alone" in it, or with positions "inner" or "outer"."""

    places: list[tuple[int, str]]
    lookups: list[bool]

    def layout(self, site: int, value: Tensor, samples: int) -> Layout:
        dim, kind = self.places[site]
        others, rest = divmod(value.shape[dim], samples)
        if rest or (kind == "alone" and others != 1):
            raise UncoveredError(
                f"a layer whose input of shape {tuple(value.shape)} does not show its {samples} samples"
            )
        return (dim, 1, samples, others) if kind == "inner" else (dim, others, samples, 1)

    def suits(self, seen: Seen) -> bool:
        """Whether this is a plan of another pass, by its sites and their shapes."""
        if len(seen.probes) != len(self.places) or seen.lookups != self.lookups:
            return False
        try:
            for i, probe in enumerate(seen.probes):
                self.layout(i, probe.value, seen.samples)
        except UncoveredError:
            return False
        return True


def find_plan(base: Seen, changed: list[Seen]) -> Plan:
    """Where the samples are at each site.

    Args:
        base: a pass over a few samples.
        changed: passes after a change of sample j alone, for each j.

    Raises:
        UncoveredError: they are nowhere, such as behind an operation that mixes samples.
    """
    places = []
    for i, probe in enumerate(base.probes):
        touched = [probe.value != other.probes[i].value for other in changed]
        options = _candidates(probe, len(changed))
        fitting = [option for option in options if _fits(option, touched)]
        if not fitting:
            raise UncoveredError(f"a layer on shape {tuple(probe.value.shape)} whose samples are not apart")
        places.append(fitting[0])
    return Plan(places, base.lookups)


def _candidates(probe: Probe, samples: int) -> list[tuple[int, str]]:
    """Dimensions that can hold the samples, alone or merged with positions behind or before them."""
    positions = probe.value.shape[: probe.value.dim() - probe.features]
    alone = [(d, "alone") for d, size in enumerate(positions) if size == samples]
    merged = [(d, size) for d, size in enumerate(positions) if size != samples and size % samples == 0]
    return alone + [(d, kind) for d, _ in merged for kind in ("inner", "outer")]


def _fits(option: tuple[int, str], touched: list[Tensor]) -> bool:
    """Whether only the entries of sample j changed with it."""
    dim, kind = option
    samples = len(touched)
    for j, mask in enumerate(touched):
        index = torch.arange(mask.shape[dim], device=mask.device)
        owner = index // (len(index) // samples) if kind == "inner" else index % samples
        if bool(mask.movedim(dim, 0)[owner != j].any()):
            return False
    return True
