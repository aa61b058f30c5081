import pytest
import torch

from samlite import Operator

Q, _ = torch.linalg.qr(torch.randn(200, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
MATRIX = (Q * torch.linspace(-1, 2, 200, dtype=torch.float64)) @ Q.T
MATRIX = (MATRIX + MATRIX.T) / 2
OPERATOR = Operator.of(lambda v: MATRIX @ v, MATRIX[0])


def test_a_result_that_converged_has_no_advice() -> None:
    assert OPERATOR.eigenvalues(2, tol=1e-2).advice == "" and OPERATOR.trace().advice == ""


@pytest.mark.parametrize(
    ("call", "advice"),
    [
        (lambda h: h.eigenvalues(tol=1e-12, max_matvecs=5), "raise tol or max_matvecs, or measure in float64"),
        (lambda h: h.trace(tol=1e-9, method="hutchinson", max_matvecs=40), "raise tol or max_matvecs"),
        (lambda h: h.density(tol=1e-6, steps=60, max_matvecs=300), "raise tol or max_matvecs"),
    ],
)
def test_a_result_that_did_not_converge_says_what_to_try(call, advice) -> None:  # type: ignore[no-untyped-def]
    result = call(OPERATOR)
    assert not result.converged and advice in result.advice


def test_a_search_that_did_not_finish_says_what_to_try() -> None:
    # In one dimension the largest eigenvalue is there at once, and most of the spectrum touches it.
    crowded = torch.diag(torch.cat([torch.ones(150), 1 - torch.rand(150) * 1e-4]).double())
    result = Operator.of(lambda v: crowded @ v, crowded[0]).eigenvalues(tol=0.1, verify=True, max_matvecs=8)
    assert result.complete is False and result.advice == (
        "raise max_matvecs, or ask for fewer eigenvalues"
        if result.converged
        else "raise tol or max_matvecs, or measure in float64"
    )
