import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Result
from scipy import stats

from samlite import sweep
from samlite.files import write_json
from samlite.report.convergence import convergence, fit
from samlite.training.loop import train


def test_the_rate_of_an_exponential_is_found_whatever_its_units() -> None:
    steps = [10, 20, 40, 70, 110]
    rate, r2 = fit(steps, [3 * math.exp(-0.02 * step) for step in steps]) or (0, 0)
    assert rate == pytest.approx(0.02, rel=1e-12) and r2 == pytest.approx(1, abs=1e-12)


def test_rate_and_straightness_are_those_of_scipy() -> None:
    draw = np.random.default_rng(0)
    steps = np.arange(1, 30)
    logs = -0.1 * steps + draw.normal(0, 0.4, size=29)
    expected = stats.linregress(steps, logs)
    assert fit(steps.tolist(), np.exp(logs).tolist()) == pytest.approx((-expected.slope, expected.rvalue**2), rel=1e-9)


def test_losses_at_the_rounding_of_float32_do_not_bend_the_line() -> None:
    losses = [math.exp(-step) for step in range(10)] + [5e-8] * 20
    rate, r2 = fit(range(30), losses) or (0, 0)
    assert rate == pytest.approx(1, rel=1e-12) and r2 == pytest.approx(1)
    assert fit([1, 2], [1.0, 0.5]) is None and fit(range(4), [1e-9] * 4) is None
    assert fit(range(3), [0.5] * 3) == (0, 1)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    recipe = {"epochs": 4, "schedule": "constant", "lr": 0.01, "momentum": 0.0}
    cells = sweep.grid("synthetic", [8, 16], seeds=2, recipe=recipe, device="cpu")
    write_json(folder / "sweep.json", {"cells": [cell.to_json() for cell in cells]})
    for cell in cells:  # in this process, to save time
        list(train(cell, folder / cell.name))
    return folder


def test_every_group_of_a_sweep_has_the_rates_of_its_runs(swept: Path) -> None:
    found = convergence(swept)
    assert [(each.group.width, each.group.optimizer) for each in found] == [
        (8, "sgd"), (8, "sam"), (16, "sgd"), (16, "sam")
    ]  # fmt: skip
    for each in found:
        rates = []
        for curve in each.curves:
            assert curve.steps == [32, 64, 96, 128]
            rates.append(-np.polyfit(curve.steps, np.log(curve.losses), 1)[0])
        assert each.rate is not None and each.rate.mean == pytest.approx(np.mean(rates), rel=1e-9)
        assert each.parameters == 52 * each.group.width + 1


def test_the_report_shows_the_rates_and_draws_them(
    cli: Callable[..., Result], swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("COLUMNS", "100")
    shown = cli("report", swept, "--convergence", "--figure", tmp_path / "c.png")
    assert shown.status == 0 and "rate (1e-3 a step)" in shown.out and "sam ρ=0.1" in shown.out
    assert (tmp_path / "c.png").stat().st_size > 10_000
    document = json.loads(cli("report", swept, "--convergence", "--json").out)
    assert [each["group"]["width"] for each in document] == [8, 8, 16, 16]
    assert len(document[0]["curves"][0]["losses"]) == 4


def test_records_that_are_damaged_are_named(cli: Callable[..., Result], swept: Path) -> None:
    path = swept / "sgd-w8-s0" / "metrics.jsonl"
    whole = path.read_text()
    path.write_text("{}\n")
    ended = cli("report", swept, "--convergence")
    path.write_text(whole)
    assert ended.status == 2 and "metrics.jsonl must hold the records of a run" in ended.err


@pytest.mark.parametrize(
    ("line", "change", "message"),
    [
        (0, {"steps": "x"}, "of epoch 1: steps must be an integer >= 0, got 'x'"),
        (1, {"train_loss": None}, "of epoch 2: train_loss must be a number, got None"),
        (1, {"train_loss": 10**400}, "of epoch 2: train_loss must be a number"),
        (2, {"epoch": 7}, "of epoch 3: epoch must count up from 1, got 7"),
        (3, {"steps": 1}, "steps must grow from epoch to epoch"),
        (3, {"lr": -0.1}, "of epoch 4: lr must be a number >= 0, got -0.1"),
    ],
)
def test_records_are_refused_by_file_epoch_and_field(swept: Path, line: int, change: Any, message: str) -> None:
    path = swept / "sgd-w8-s0" / "metrics.jsonl"
    whole = path.read_text()
    lines = whole.splitlines()
    lines[line] = json.dumps({**json.loads(lines[line]), **change})
    path.write_text("\n".join(lines))
    try:
        with pytest.raises(ValueError) as error:
            convergence(swept)
    finally:
        path.write_text(whole)
    assert f"{path} must hold the records of a run" in str(error.value) and message in str(error.value)
