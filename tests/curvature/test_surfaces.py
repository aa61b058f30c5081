"""Losses along lines and planes, against the losses of networks that stand there."""

from copy import deepcopy

import pytest
import torch
from models import Residual, network, samples
from oracles import dense_hessian
from torch import nn

import samlite
from samlite import Hessian, surface

pytestmark = pytest.mark.usefixtures("float64")
CRITERION = nn.CrossEntropyLoss()


def between(first, second, t, x, y):
    model = deepcopy(first)
    with torch.no_grad():
        for p, a, b in zip(model.parameters(), first.parameters(), second.parameters(), strict=True):
            p.copy_((1 - t) * a + t * b)
    return CRITERION(model(x), y).item()


def other(scale=0.5):
    model = network()
    torch.manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn_like(p))
    return model


def test_the_line_between_two_networks_and_its_barrier():
    first, second, (x, y) = network(), other(1.5), samples()
    found = surface(Hessian(first, CRITERION, (x, y)), second, points=13)
    right = torch.tensor([between(first, second, t, x, y) for t in found.axis.tolist()])
    torch.testing.assert_close(found.losses, right, rtol=1e-9, atol=1e-12)
    assert {0.0, 1.0} <= set(found.axis.tolist())
    inside = [(t, loss) for t, loss in zip(found.axis.tolist(), right.tolist(), strict=True) if 0 <= t <= 1]
    (_, start), (_, end) = inside[0], inside[-1]
    assert found.barrier == pytest.approx(max(loss - ((1 - t) * start + t * end) for t, loss in inside), rel=1e-9)
    assert found.lengths[0] == pytest.approx(
        sum(((a - b).square().sum().item()) for a, b in zip(first.parameters(), second.parameters(), strict=True))
        ** 0.5
    )


def test_random_directions_have_the_norms_of_the_filters_and_leave_vectors_alone():
    model, (x, y) = network(), samples()
    h = Hessian(model, CRITERION, (x, y))
    from samlite.curvature.surfaces import _normalised

    parts = torch.split(_normalised(h, 0), [p.numel() for p in h.params])
    for p, part in zip(h.params, parts, strict=True):
        if p.dim() < 2:
            assert not part.any()
        else:
            torch.testing.assert_close(part.view(p.shape).norm(dim=1), p.detach().norm(dim=1))
    found = surface(h, plane=True, points=3, radius=0.5)
    assert found.losses.shape == (3, 3) and found.barrier is None
    assert float(found.losses[1, 1]) == pytest.approx(CRITERION(model(x), y).item(), rel=1e-9)


def test_along_an_eigenvector_the_loss_bends_by_its_eigenvalue():
    model, (x, y) = network(), samples()
    h = Hessian(model, CRITERION, (x, y))
    largest = float(torch.linalg.eigvalsh(dense_hessian(model, lambda call: CRITERION(call(x), y)))[-1])
    found = surface(h, "eigenvectors", points=3, radius=1e-3)
    bend = (found.losses[0] - 2 * found.losses[1] + found.losses[2]) / 1e-6
    assert float(bend) == pytest.approx(largest, rel=1e-4)  # the fourth derivative, and tol=1e-3 in the vector squared


def test_batch_norm_statistics_are_those_of_each_point_between_networks_and_are_put_back():
    torch.manual_seed(0)
    first, second = Residual(), Residual()
    x, y = torch.randn(32, 2, 6, 6), torch.randint(0, 3, (32,))
    for model in (first, second):  # statistics of these very data
        model.norm.momentum = None
        model.norm.reset_running_stats()
        model.train()(x)
        model.eval()
    buffers = {name: b.clone() for name, b in first.named_buffers()}
    found = surface(Hessian(first, CRITERION, [(x, y)]), second, points=2)
    ends = found.losses[found.axis.eq(0)], found.losses[found.axis.eq(1)]
    assert float(ends[0]) == pytest.approx(CRITERION(first(x), y).item(), rel=1e-9)
    assert float(ends[1]) == pytest.approx(CRITERION(second(x), y).item(), rel=1e-9)
    for name, b in first.named_buffers():
        assert torch.equal(b, buffers[name])
    assert not first.training and first.norm.momentum is None


def test_accuracy_comes_along_and_weights_stay():
    model, (x, y) = network(), samples()
    before = [p.clone() for p in model.parameters()]
    done = []
    found = surface(
        Hessian(model, CRITERION, (x, y)), other(), points=3, metric=True, progress=lambda *at: done.append(at)
    )
    at = found.axis.tolist().index(1.0)
    assert float(found.accuracy[at]) == pytest.approx(float((other()(x).argmax(1) == y).double().mean()))
    assert done[-1] == (len(found.axis), len(found.axis))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_plane_through_three_networks_holds_all_of_them():
    first, second, third, (x, y) = network(), other(), other(0.2), samples()
    found = surface(Hessian(first, CRITERION, (x, y)), [second, third], points=4)
    zero, one = found.axis.tolist().index(0.0), found.axis.tolist().index(1.0)
    assert float(found.losses[one, zero]) == pytest.approx(CRITERION(second(x), y).item(), rel=1e-9)
    assert float(found.losses[zero, one]) == pytest.approx(CRITERION(third(x), y).item(), rel=1e-9)


@pytest.mark.parametrize(
    ("along", "options", "line"),
    [
        ("sideways", {}, "along must be random, eigenvectors or networks of the same kind, got 'sideways'"),
        ("random", {"points": 1}, "points must be from 2 to 401, got 1"),
        ("random", {"radius": -1.0}, "radius must be > 0, got -1.0"),
        (nn.Linear(2, 2), {}, "networks must be of one kind, got 0.weight"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(along, options, line):
    model, (x, y) = network(), samples()
    with pytest.raises(samlite.UsageError, match=line):
        surface(Hessian(model, CRITERION, (x, y)), along, **options)
    with pytest.raises(samlite.UsageError, match="networks must have different weights, got the same"):
        surface(Hessian(model, CRITERION, (x, y)), model)
