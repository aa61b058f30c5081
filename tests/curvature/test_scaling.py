import math

import pytest
import torch

from samlite.curvature.scaling import holds, ldexp, ldexp_block, multiplied, require_float64


def test_numbers_are_multiplied_by_powers_of_two_and_overflow_to_infinity() -> None:
    assert ldexp(1.5, 3) == 12 and ldexp(-1.0, 5000) == -math.inf and ldexp(1.0, -5000) == 0
    block = torch.tensor([1.5, -2.0], dtype=torch.float64)
    expected = torch.tensor([math.ldexp(1.5, -1070), math.ldexp(-2.0, -1070)], dtype=torch.float64)
    assert torch.equal(ldexp_block(block, -1070), expected)


def test_a_number_that_loses_digits_is_not_held() -> None:
    assert holds(1.0, -1022) and not holds(1.0, -1023) and not holds(1.0, 1024) and holds(0.0, -9999)
    with pytest.raises(ValueError, match=r"traces must be numbers that a float64 holds, got about 2\^2001"):
        require_float64(1.0, 2000, "traces")


@pytest.mark.parametrize(("dtype", "exponent"), [(torch.float32, 140), (torch.float32, -140), (torch.float64, 1100)])
def test_products_beyond_their_type_are_refused(dtype: torch.dtype, exponent: int) -> None:
    with pytest.raises(ValueError, match="products must be numbers that float"):
        multiplied(torch.ones(3, 2, dtype=dtype), exponent)


def test_columns_are_judged_by_their_largest_number() -> None:
    block = torch.tensor([[1.0, 0.0], [1e-30, 0.0]])
    assert torch.equal(multiplied(block, -20), block * 2.0**-20) and multiplied(block, 0) is block
