import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
from conftest import Result
from safetensors.torch import load_file

from samlite import sweep, tasks
from samlite.files import write_json
from samlite.report.solutions import solutions
from samlite.training.loop import train

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """At width 192 every run interpolates, at 8 none does."""
    folder = tmp_path_factory.mktemp("sweep")
    recipe = {"epochs": 40, "rho": 0.02, "batch_size": 64, "lr": 0.1, "schedule": "constant"}
    cells = sweep.grid("digits", [8, 192], seeds=2, recipe=recipe, device="cpu")
    write_json(folder / "sweep.json", {"cells": [cell.to_json() for cell in cells]})
    for cell in cells:  # in this process, to save time
        list(train(cell, folder / cell.name))
    return folder


def flat(path: Path) -> torch.Tensor:
    return torch.cat([tensor.flatten().double() for _, tensor in sorted(load_file(path).items())])


def first(seed: int) -> torch.Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        state = tasks.get("digits").model(192).state_dict()
    return torch.cat([tensor.flatten().double() for _, tensor in sorted(state.items())])


def test_distances_are_those_between_the_weights_of_the_files(swept: Path) -> None:
    groups = {(each.group.width, each.group.optimizer): each for each in solutions(swept)}
    sam, sgd = groups[192, "sam"], groups[192, "sgd"]
    weights = {
        name: [flat(swept / f"{name}-w192-s{seed}" / "model.safetensors") for seed in (0, 1)]
        for name in ("sgd", "sam-rho0.02")
    }
    moved = [float((weights["sam-rho0.02"][seed] - first(seed)).norm()) for seed in (0, 1)]
    apart = [float((weights["sam-rho0.02"][seed] - weights["sgd"][seed]).norm()) for seed in (0, 1)]
    assert sam.interpolating == sgd.interpolating == 2
    assert sam.travelled is not None and sam.travelled.mean == pytest.approx(mean(moved), rel=1e-9)
    assert sam.apart is not None and sam.apart.mean == pytest.approx(mean(apart), rel=1e-9) and sgd.apart is None
    relative = mean(moved[seed] / float(first(seed).norm()) for seed in (0, 1))
    assert sam.relative is not None and sam.relative.mean == pytest.approx(relative, rel=1e-9)
    metrics = [
        json.loads((swept / f"sgd-w192-s{s}" / "result.json").read_text())["final"]["test_metric"] for s in (0, 1)
    ]
    assert sgd.metric_spread == pytest.approx(stdev(metrics))


def test_runs_that_do_not_interpolate_are_counted_and_left_out(swept: Path) -> None:
    narrow = next(each for each in solutions(swept) if each.group.width == 8)
    assert (narrow.runs, narrow.interpolating) == (2, 0)
    assert narrow.metric is narrow.travelled is narrow.apart is None


def test_the_report_shows_the_solutions_and_draws_them(
    cli: Callable[..., Result], swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("COLUMNS", "100")
    shown = cli("report", swept, "--solutions", "--figure", tmp_path / "s.png")
    assert shown.status == 0 and "2 of 2" in shown.out and "0 of 2" in shown.out
    assert (tmp_path / "s.png").stat().st_size > 10_000
    document = json.loads(cli("report", swept, "--solutions", "--json").out)
    assert [each["interpolating"] for each in document] == [0, 0, 2, 2]


def test_every_variant_of_sam_is_compared_with_its_base(cli: Callable[..., Result], tmp_path: Path) -> None:
    recipe = {"epochs": 1}
    cells = sweep.grid("digits", [8], ["sgd", "friendly", "agnostic", "sampa"], seeds=1, recipe=recipe, device="cpu")
    for own in ({"adaptive": "all"}, {"normalize": False}, {"every": 2}, {"m": 50}):
        cells += sweep.grid("digits", [8], ["sam"], seeds=1, recipe={**recipe, **own}, device="cpu", base="sgd")
    write_json(tmp_path / "sweep.json", {"cells": [cell.to_json() for cell in cells]})
    for cell in cells:
        list(train(cell, tmp_path / cell.name))
        path = tmp_path / cell.name / "result.json"  # to train until they interpolate would take a minute
        write_json(path, {**json.loads(path.read_text()), "interpolates": True})
    found = {each.group.optimizer: each for each in solutions(tmp_path)}
    assert len(found) == 8 and found.pop("sgd").apart is None
    for label, each in found.items():
        assert each.apart is not None and each.apart.mean > 0, label
    assert cli("report", tmp_path, "--solutions").status == 0
