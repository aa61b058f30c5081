"""Random probes: how many are enough, and what their mean is worth."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from samlite.curvature.matrix import Progress
from samlite.intervals import student_t

NORMAL = 1.959964  # the 97.5 % quantile


def standard_errors(samples: Tensor, skewed: bool = False) -> Tensor:
    """The standard errors of the means of (n, columns) samples, such that mean ± 1.96 errors covers 95 %: (columns,).

    With few samples that takes more than std / sqrt(n): Student's quantile over the normal one and, for samples of a
    skewed distribution such as the traces of a matrix with outliers, the skewness term of the two-sided interval (Hall,
    "The Bootstrap and Edgeworth Expansion", 1992, 3.5).
    """
    n = len(samples)
    errors = samples.std(0) / math.sqrt(n)
    widening = student_t(n - 1) / NORMAL
    if not skewed:
        return errors * widening
    centred = samples - samples.mean(0)
    largest = centred.abs().amax(0)
    centred = centred / largest.where(largest > 0, 1)  # as third powers may underflow
    variance = centred.square().mean(0)
    skewness = centred.pow(3).mean(0) / variance.where(variance > 0, 1).pow(1.5)
    weight = (NORMAL**4 + 2 * NORMAL**2 - 3) / 18
    return errors * (widening + skewness.square() * (weight / n))


def until_exact(
    probes: Any,
    excess: Callable[[], float],
    *,
    first_look: int,
    in_a_row: int = 2,
    progress: Progress | None = None,
) -> bool:
    """Draw probes until their error is what is asked.

    Args:
        probes: has `draw(more)`, which takes so many more, fewer where products run out, and returns their number;
            `exhausted`, whether products have run out; and `matvecs`, their number so far.
        excess: the error over what is allowed.
        first_look: probes before the first error: with fewer, those that happen to agree would stop it early.
        in_a_row: how many times the error must be small enough, as once may be luck.

    Returns:
        Whether it got there before products ran out.
    """
    look, drawn, good = first_look, 0, 0
    while True:
        drawn = probes.draw(look - drawn)
        now = excess()
        if progress:
            progress(probes.matvecs, now)
        good = good + 1 if now <= 1 else 0
        if good == in_a_row:
            return True
        if probes.exhausted:
            return False
        look += max(1, look // 4)
