"""What a forward pass shows of its layers, and where samples are found in them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samlite.curvature.capture.plan import Probe, Seen, UncoveredError, find_plan
from samlite.curvature.capture.recorder import RULES, Capture

SAMPLES = 3


def seen(value: Tensor, features: int = 1) -> Seen:
    return Seen([Probe(value, features)], [], SAMPLES)


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


@pytest.mark.parametrize(
    ("shape", "dim", "kind", "layout"),
    [
        ((3, 5), 0, "alone", (0, 1, 3, 1)),
        ((7, 3, 5), 1, "alone", (1, 1, 3, 1)),
        ((12, 5), 0, "inner", (0, 1, 3, 4)),  # positions behind the samples
        ((12, 5), 0, "outer", (0, 4, 3, 1)),  # and before them
    ],
)
def test_samples_are_found_where_only_their_entries_change(
    shape: tuple[int, ...], dim: int, kind: str, layout: tuple[int, ...]
) -> None:
    value = torch.randn(shape)
    plan = find_plan(seen(value), with_sample_changed(value, dim, kind))
    if kind == "alone":  # one row a sample: outer positions are as good
        assert plan.layout(0, value, SAMPLES)[0] == dim and plan.layout(0, value, SAMPLES)[2] == 3
    else:
        assert plan.layout(0, value, SAMPLES) == layout
    assert plan.suits(seen(torch.randn(shape))) and not plan.suits(seen(torch.randn(5, 5)))


def test_samples_that_mix_are_found_nowhere() -> None:
    value = torch.randn(3, 5)
    with pytest.raises(UncoveredError, match="whose samples are not apart"):
        find_plan(seen(value), [seen(value + j + 1) for j in range(SAMPLES)])


PASSES: dict[str, tuple[Callable[[Any], Tensor], tuple[tuple[int, ...], ...], list[int]]] = {
    "linear": (lambda w: F.linear(torch.ones(3, 4), w[0], w[1]), ((5, 4), (5,)), [1]),
    "matmul": (lambda w: torch.ones(3, 4) @ w[0], ((4, 5),), [1]),
    "conv2d": (lambda w: F.conv2d(torch.ones(3, 2, 4, 4), w[0]), ((5, 2, 3, 3),), [3]),
    "layer norm": (lambda w: F.layer_norm(torch.randn(3, 4), (4,), w[0], w[1]), ((4,), (4,)), [1]),
    "scale and shift": (lambda w: torch.ones(3, 4) * w[0] + w[1], ((4,), (4,)), [1, 1]),
    "embedding": (lambda w: F.embedding(torch.arange(3), w[0]), ((6, 4),), [0]),
}


@pytest.mark.parametrize("name", PASSES)
def test_a_layer_is_recorded_with_what_are_features_of_it(name: str) -> None:
    run, shapes, features = PASSES[name]
    weights = [nn.Parameter(torch.randn(shape), requires_grad=False) for shape in shapes]
    plain = run(weights) if name != "layer norm" else None
    with Capture(weights, SAMPLES) as capture, torch.no_grad():
        z = run(weights)
    assert [probe.features for probe in capture.seen.probes] == features
    assert plain is None or torch.allclose(z, plain)


def test_an_operation_without_a_rule_is_named() -> None:
    weight = nn.Parameter(torch.ones(3), requires_grad=False)
    with Capture([weight], SAMPLES), pytest.raises(UncoveredError, match=r"torch.*sin"):
        weight.sin()


def test_every_function_has_one_rule() -> None:
    assert F.linear in RULES and torch.conv3d in RULES and Tensor.__radd__ in RULES and len(RULES) == 27
