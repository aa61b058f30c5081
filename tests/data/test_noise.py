import math

import pytest
import torch

from samlite.data.noise import noisy
from samlite.tasks import TensorData, get


@pytest.mark.parametrize(("rate", "changed"), [(0.0, 0), (0.1, 100), (0.2504, 250), (0.9, 900)])
def test_exactly_the_rounded_fraction_moves_and_none_to_its_own_class(rate: float, changed: int) -> None:
    labels = torch.randint(0, 7, (1000,), generator=torch.Generator().manual_seed(3))
    after = noisy(labels, 7, rate, seed=0)
    assert int((after != labels).sum()) == changed
    assert after.dtype == labels.dtype and after.min() >= 0 and after.max() <= 6


def test_every_other_class_is_as_likely() -> None:
    after = noisy(torch.full((60_000,), 2), 4, 0.5, seed=1)
    counts = torch.bincount(after, minlength=4)[[0, 1, 3]].tolist()
    assert all(abs(count - 10_000) < 5 * math.sqrt(10_000 * 2 / 3) for count in counts)  # five standard deviations


def test_the_seed_decides_and_the_labels_stay_what_they_were() -> None:
    labels = torch.arange(50) % 5
    first, same, other = (noisy(labels, 5, 0.4, seed) for seed in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert torch.equal(labels, torch.arange(50) % 5)


def test_places_without_a_label_stay_and_do_not_count() -> None:
    tokens = torch.tensor([[0, 1, -100, -100], [2, 0, 1, 2]])
    after = noisy(tokens, 3, 0.5, seed=0)
    assert torch.equal(after == -100, tokens == -100) and int((after != tokens).sum()) == 3
    binary = torch.tensor([[0.0, math.nan, 1.0], [1.0, 0.0, math.nan]])
    after = noisy(binary, 2, 1 / 4, seed=0)
    assert torch.equal(after.isnan(), binary.isnan())
    assert int((after.nan_to_num(5) != binary.nan_to_num(5)).sum()) == 1 and set(after[~after.isnan()].tolist()) == {
        0,
        1,
    }


def test_noise_follows_neither_the_order_of_training_nor_what_is_measured() -> None:
    n, rate = 4000, 0.25
    changed = noisy(torch.zeros(n, dtype=torch.int64), 2, rate, seed=0) != 0
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))  # of the first epoch, and of a held-out part
    task = get("digits")
    (rows, _), _ = task.subsample(task.model(8), TensorData(torch.arange(n)[:, None], torch.zeros(n)), n // 4, 0)
    for part in (order[: n // 4], order[-n // 4 :], rows.flatten()):
        assert abs(changed[part].double().mean() - rate) < 5 * (rate * (1 - rate) / (n // 4)) ** 0.5
