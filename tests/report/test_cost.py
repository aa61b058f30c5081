import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Result

from samlite.files import write_json, write_lines
from samlite.report.cost import costs
from samlite.training.config import Config


@pytest.fixture
def swept(tmp_path: Path) -> Path:
    """Runs whose validation metric is a function of optimizer, seed and epoch; SAM pays twice for an epoch."""
    cells = []
    for optimizer, price in (("sgd", 10), ("sam", 20)):
        for seed in range(2):
            cell = Config.of("digits", width=8, optimizer=optimizer, seed=seed, epochs=4, device="cpu")
            cells.append(cell)
            run = tmp_path / cell.name
            run.mkdir()
            write_json(run / "config.json", cell.to_json())
            write_json(run / "result.json", {"parameters": 587})
            gain = 0.01 if optimizer == "sam" else 0
            records = [
                {"gradient_evaluations": price * e, "validation_metric": 0.1 * e + 0.02 * seed + gain}
                for e in range(1, 5)
            ]
            write_lines(run / "metrics.jsonl", records)
    write_json(tmp_path / "sweep.json", {"cells": [cell.to_json() for cell in cells]})
    return tmp_path


def test_optimizers_are_compared_after_the_gradients_of_the_cheapest(swept: Path) -> None:
    sgd, sam = costs(swept)
    assert (sgd.group.optimizer, sam.group.optimizer) == ("sgd", "sam")
    assert sgd.budget == sam.budget == 40 and (sgd.epochs, sam.epochs) == (4, 2)
    assert sgd.at_budget and sgd.at_budget.mean == pytest.approx(0.41)
    assert sam.at_budget and sam.at_budget.mean == pytest.approx(0.22)
    assert sam.at_end and sam.at_end.mean == pytest.approx(0.42) and sam.gradients == 80
    assert sam.curve == [(20 * e, pytest.approx(0.1 * e + 0.02)) for e in range(1, 5)]


def test_the_report_shows_and_draws_them(
    cli: Callable[..., Result], swept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("COLUMNS", "100")
    shown = cli("report", swept, "--by", "cost", "--figure", swept / "cost.png")
    assert shown.status == 0 and "validation accuracy % at equal cost" in shown.out and "22 ± 13" in shown.out
    assert (swept / "cost.png").stat().st_size > 10_000
    assert json.loads(cli("report", swept, "--by", "cost", "--json").out)[1]["budget"] == 40
    assert "--by cost must stand alone" in cli("report", swept, "--by", "cost", "--solutions").err
