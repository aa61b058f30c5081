"""Means over seeds with their 95 % intervals by Student's t."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Literal


@dataclass(frozen=True)
class Interval:
    """A mean over n seeds and the half width of its 95 % interval, None for one seed."""

    mean: float
    half_width: float | None
    n: int

    @property
    def positive(self) -> bool:
        """Whether the whole interval is above zero; a single seed shows nothing."""
        return self.half_width is not None and self.mean > self.half_width

    @property
    def negative(self) -> bool:
        """Whether the whole interval is below zero."""
        return self.half_width is not None and -self.mean > self.half_width

    @classmethod
    def of(cls, values: Iterable[float]) -> "Interval | None":
        sample = list(values)
        if not sample:
            return None
        if len(sample) == 1:
            return cls(sample[0], None, 1)
        return cls(mean(sample), student_t(len(sample) - 1) * stdev(sample) / len(sample) ** 0.5, len(sample))


@dataclass(frozen=True)
class Geometric:
    """A geometric mean over n seeds and its 95 % interval, None for one seed.

    It is undefined where a value is not positive; dropping such values would bias the mean.
    """

    mean: float | None
    low: float | None
    high: float | None
    n: int
    zeros: int  # values that are not positive: an s_k of a negative power is 0

    @classmethod
    def of(cls, values: Iterable[float]) -> "Geometric | None":
        sample = list(values)
        if zeros := sum(value <= 0 for value in sample):
            return cls(None, None, None, len(sample), zeros)
        logs = Interval.of(map(math.log, sample))
        if logs is None:
            return None
        half = logs.half_width
        low, high = (None, None) if half is None else (_exp(logs.mean - half), _exp(logs.mean + half))
        return cls(_exp(logs.mean), low, high, logs.n, 0)


@dataclass(frozen=True)
class Comparison:
    """A quantity at SAM's minima over that at its base optimizer's, paired by seed."""

    ratio: Geometric
    verdict: Literal["smaller", "larger", "no significant difference"] | None  # None without an interval

    @classmethod
    def of(cls, pairs: Iterable[tuple[float, float]]) -> "Comparison | None":
        """Of pairs (SAM's value, its base's). A pair in which one is not positive has no ratio."""
        ratio = Geometric.of(sam / base if min(sam, base) > 0 else 0.0 for sam, base in pairs)
        if ratio is None:
            return None
        if ratio.low is None or ratio.high is None:
            return cls(ratio, None)
        return cls(ratio, "smaller" if ratio.high < 1 else "larger" if ratio.low > 1 else "no significant difference")


def paired(one: Mapping[int, float], other: Mapping[int, float]) -> Interval | None:
    """The mean difference of two quantities over the seeds that both have, with its interval."""
    return Interval.of(one[seed] - other[seed] for seed in one if seed in other)


def student_t(degrees: int, confidence: float = 0.95) -> float:
    """The t with P(|T| < t) = confidence, by bisection of the closed form for whole degrees of freedom.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    odd = degrees % 2

    def within(angle: float) -> float:
        term, total = math.cos(angle) ** odd, 0.0
        for power in range(odd, degrees - 1, 2):
            total += term
            term *= math.cos(angle) ** 2 * (power + 1) / (power + 2)
        sine = math.sin(angle) * total
        return 2 / math.pi * (angle + sine) if odd else sine

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < confidence else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))  # a float ends at exp(709)
