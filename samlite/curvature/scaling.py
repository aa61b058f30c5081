"""Numbers beside a power of two: the matrix is measured over 2^exponent, so that no square underflows or overflows."""

import math
import sys

import torch
from torch import Tensor

from samlite.errors import require


def ldexp(number: float, exponent: int) -> float:
    """number * 2^exponent, infinite or 0 beyond what a float64 holds."""
    try:
        return math.ldexp(number, exponent)
    except OverflowError:
        return math.copysign(math.inf, number)


def holds(number: float, exponent: int) -> bool:
    """Whether a float64 holds number * 2^exponent with all its digits."""
    return number == 0 or sys.float_info.min <= abs(ldexp(number, exponent)) < math.inf


def require_float64(number: float, exponent: int, what: str) -> None:
    """Raise UsageError unless a float64 holds number * 2^exponent."""
    require(
        holds(number, exponent),
        f"{what} must be numbers that a float64 holds, got about 2^{math.frexp(number)[1] + exponent}; "
        "multiply the loss by a power of two",
    )


def ldexp_block(block: Tensor, exponent: int) -> Tensor:
    """block * 2^exponent."""
    half = exponent // 2  # as 2^exponent itself may not be a number
    return block * 2.0**half * 2.0 ** (exponent - half)


def multiplied(block: Tensor, exponent: int) -> Tensor:
    """block * 2^exponent, column by column within the numbers that its type holds."""
    if exponent == 0:
        return block
    result = ldexp_block(block, exponent)
    kind, before, after = torch.finfo(block.dtype), block.abs().amax(0), result.abs().amax(0)
    require(
        bool(((before == 0) | ~before.isfinite() | ((after >= kind.tiny) & after.isfinite())).all()),
        f"products must be numbers that {kind.dtype} holds, got some about 2^{exponent} times "
        f"{float(before.max()):.1e}; multiply the loss by a power of two",
    )
    return result
