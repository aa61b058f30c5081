import pytest
import torch
from models import prepared
from torch import nn

from samlite import Hessian, Tracker, UsageError

pytestmark = pytest.mark.usefixtures("float64")


class Quartic(nn.Module):
    """f = sum w_i^4 / 12, with the Hessian diag(w_i^2)."""

    def __init__(self, curvature: list[float]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(curvature).double().sqrt())

    def become(self, curvature: list[float]) -> None:
        with torch.no_grad():
            self.w.copy_(torch.tensor(curvature).double().sqrt())


def quartic(curvature: list[float], k: int = 1) -> tuple[Quartic, Tracker]:
    model = Quartic(curvature)
    data = [(torch.zeros(1), torch.zeros(1))]
    return model, Tracker(Hessian(model, lambda model, batch: model.w.pow(4).sum() / 12, data), k)


def test_an_eigenvalue_that_overtakes_is_noticed() -> None:
    pytest.importorskip("samlite._C")
    rest = [1.0, 0.5] * 10
    model, tracker = quartic([4.0, 3.0, *rest])
    for second in (3.0, 3.3, 3.6, 3.9, 4.2, 4.5):  # its eigenvector stays orthogonal to the one that is followed
        model.become([4.0, second, *rest])
        (value,) = tracker.measure()["eigenvalues"]
        assert value == pytest.approx(max(4.0, second), rel=1e-3)


@pytest.mark.parametrize(("dtype", "exponents"), [(torch.float64, [-548, 332]), (torch.float32, [-70, 70])])
def test_tracked_eigenvalues_scale_with_the_loss(dtype, exponents):
    def found(exponent):
        torch.manual_seed(1)
        model, x, y = prepared("MLP")
        model, x = model.to(dtype), x.to(dtype)

        def loss(model, batch):
            return nn.functional.cross_entropy(model(batch[0]), batch[1]) * 2.0**exponent

        tracker, values = Tracker(Hessian(model, loss, (x, y)), 2), []
        for _ in range(4):
            values.append(tracker.measure()["eigenvalues"])
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1.01)
        return torch.tensor(values) / 2.0**exponent

    right = found(0)
    for exponent in exponents:
        assert torch.equal(found(exponent), right)


def test_a_tracker_that_is_restored_goes_on_as_the_one_that_was_saved() -> None:
    values = []
    for restore in (False, True):
        model, tracker = quartic([4.0, 3.0, *[1.0, 0.5] * 10], k=2)
        tracker.measure()
        model.become([4.1, 3.2, *[1.0, 0.5] * 10])
        if restore:
            state = tracker.state_dict()
            tracker = Tracker(tracker.hessian, 2)
            tracker.load_state_dict(state)
        values.append(tracker.measure())
    assert values[0] == values[1]


def test_the_state_of_another_network_is_refused() -> None:
    state = quartic([4.0, 3.0, 1.0], k=1)[1]
    state.measure()
    with pytest.raises(ValueError, match=r"vectors must be torch.float64 of shape \(4, 1\), got \(3, 1\)"):
        quartic([4.0, 3.0, 1.0, 0.5], k=1)[1].load_state_dict(state.state_dict())


def trained(steps: int = 3):
    torch.manual_seed(0)
    model, x, y = prepared("MLP")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def step():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    for _ in range(steps):
        step()
    return Hessian(model, nn.CrossEntropyLoss(), (x, y)), optimizer, step


def test_measures_beside_eigenvalues_are_those_of_the_hessian() -> None:
    hessian, optimizer, step = trained()
    tracker = Tracker(hessian, measures="all", optimizer=optimizer, batch_size=6)
    for _ in range(4):
        step()
        found = tracker.measure()
        right = hessian.measures(list(found["measures"]), optimizer, batch_size=6, k=1)
        assert found["measures"]["sharpness"] == found["eigenvalues"][0]
        for name, value in found["measures"].items():
            if value is None:
                assert right[name].value != right[name].value, name
            else:
                error = found["errors"].get(name, 0.0) if name == "alignment" else 1e-4
                assert value == pytest.approx(right[name].value, rel=1e-3, abs=error), name
    known = {name for name, value in found["measures"].items() if value is not None}
    assert {"edge", "preconditioned", "batch", "alignment"} <= known


def test_a_restored_tracker_of_measures_goes_on_as_the_one_that_was_saved() -> None:
    found = []
    for restore in (False, True):
        hessian, optimizer, step = trained()
        tracker = Tracker(hessian, measures="batch,preconditioned", optimizer=optimizer, batch_size=3)
        tracker.measure()
        step()
        if restore:
            state = tracker.state_dict()
            tracker = Tracker(hessian, measures="batch,preconditioned", optimizer=optimizer, batch_size=3)
            tracker.load_state_dict(state)
        found.append(tracker.measure())
    assert found[0] == found[1]


def test_what_cannot_be_followed_is_refused() -> None:
    hessian, optimizer, _ = trained()
    with pytest.raises(UsageError, match="measures must be of sharpness, edge, .*, or all, got 'worst'"):
        Tracker(hessian, measures="worst", optimizer=optimizer)
    with pytest.raises(UsageError, match="k must be between 1 and the dimension 43, got 44"):
        Tracker(hessian, 44)
