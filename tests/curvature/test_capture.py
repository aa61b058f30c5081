"""What a forward pass shows of its layers, and where samples are found in them."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samlite.curvature.capture.plan import AMBIGUOUS, Call, Probe, Seen, UncoveredError, find_plan, find_scaled
from samlite.curvature.capture.recorder import PARTS, RULES, Capture

SAMPLES = 3


def seen(value: Tensor, samples: int = SAMPLES, constant: bool = False) -> Seen:
    return Seen(samples, [], [Probe(value, constant)])


def with_sample_changed(value: Tensor, dim: int, kind: str) -> list[Seen]:
    """What is seen after a change of each sample, where the samples are so in this dimension."""
    each = []
    for j in range(SAMPLES):
        other = value.clone().movedim(dim, 0)
        index = torch.arange(len(other))
        mine = index // (len(index) // SAMPLES) == j if kind == "inner" else index % SAMPLES == j
        other[mine] += 1
        each.append(seen(other.movedim(0, dim)))
    return each


def fewer(value: Tensor, dim: int) -> Seen:
    """What is seen of two samples."""
    return seen(value.narrow(dim, 0, value.shape[dim] * 2 // SAMPLES), 2)


@pytest.mark.parametrize(
    ("shape", "dim", "kind", "layout"),
    [
        ((3, 5), 0, "alone", (0, 1, 3, 1)),
        ((7, 3, 5), 1, "alone", (1, 1, 3, 1)),
        ((3, 3, 3), 1, "alone", (1, 1, 3, 1)),  # as large as other dimensions
        ((12, 5), 0, "inner", (0, 1, 3, 4)),  # positions behind the samples
        ((12, 5), 0, "outer", (0, 4, 3, 1)),  # and before them
    ],
)
def test_samples_are_where_sizes_grow_with_them_and_entries_change(
    shape: tuple[int, ...], dim: int, kind: str, layout: tuple[int, ...]
) -> None:
    value = torch.randn(shape)
    plan = find_plan([], seen(value), fewer(value, dim), with_sample_changed(value, dim, kind))
    assert plan.layout(0, value, SAMPLES) == layout
    assert plan.suits(seen(torch.randn(shape))) and not plan.suits(seen(torch.randn(5, 5)))


def test_samples_that_mix_are_found_nowhere() -> None:
    value = torch.randn(3, 5)
    mixed = [seen(value + j + 1) for j in range(SAMPLES)]
    with pytest.raises(UncoveredError, match="whose samples are not apart"):
        find_plan([], seen(value), fewer(value, 0), mixed)
    with pytest.raises(UncoveredError, match="does not grow"):
        find_plan([], seen(value), seen(value, 2), mixed)
    with pytest.raises(UncoveredError, match="that samples share"):
        find_plan(
            [],
            seen(value, constant=True),
            seen(value, 2, constant=True),
            [seen(v.probes[0].value, constant=True) for v in mixed],
        )


def test_what_grows_with_the_samples_is_found_in_shapes_and_integers() -> None:
    more = Call([(3, 5), (3, 3), 12, 5, (4, 3)], [(6, 5)])
    less = Call([(2, 5), (2, 2), 8, 5, (5, 3)], [(4, 5)])
    (scaled,) = find_scaled(Seen(3, [more], []), Seen(2, [less], []))
    assert scaled.arguments == [0, AMBIGUOUS, True, None, AMBIGUOUS] and scaled.results == [0]
    with pytest.raises(UncoveredError, match="other steps"):
        find_scaled(Seen(3, [more], []), Seen(2, [], []))


def test_an_operation_in_place_is_named() -> None:
    weight = nn.Parameter(torch.ones(3), requires_grad=False)
    with Capture([weight], SAMPLES) as survey:
        torch.zeros(3).add_(weight)
    scaled = find_scaled(survey.seen, survey.seen)
    with Capture([weight], SAMPLES, scaled), pytest.raises(UncoveredError, match=r"torch.*add_"):
        torch.zeros(3).add_(weight)


def test_every_function_has_one_rule() -> None:
    assert F.linear in RULES and torch.conv3d in RULES and Tensor.__radd__ in RULES
    assert not set(RULES) & set(PARTS)
