"""Runs trained as one batched network, against the same runs trained alone."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from samlite import sweep
from samlite.errors import UsageError
from samlite.sweep.batched import together
from samlite.training.batched import _obstacle, pays, train_batched
from samlite.training.config import Config
from samlite.training.loop import train
from samlite.training.runs import load_run


def cells(task: str = "digits", widths: tuple[int, ...] = (8,), **recipe: Any) -> list[Config]:
    recipe = {"epochs": 2, "batch_size": 64, **recipe}
    return sweep.grid(task, widths, seeds=2, rhos=(0.05, 0.2), recipe=recipe, device="cpu")


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([t.flatten().double() for _, t in sorted(load_file(folder / "model.safetensors").items())])


def trained(folder: Path, members: list[Config]) -> list[tuple[Config, Any]]:
    return list(train_batched(members, folder))


@pytest.mark.parametrize("task", ["digits", "synthetic"])
def test_members_are_the_runs_that_are_trained_alone(tmp_path: Path, task: str) -> None:
    members = cells(task, momentum=0.9, weight_decay=1e-3)
    assert len(trained(tmp_path / "together", members)) == 2 * len(members)
    for cell in members:
        list(train(cell, tmp_path / "alone" / cell.name))
        together, alone = tmp_path / "together" / cell.name, tmp_path / "alone" / cell.name
        difference = (weights(together) - weights(alone)).norm() / weights(alone).norm()
        assert difference < 1e-5, cell.name  # 30 steps in float32
        for found, right in zip(documents(together), documents(alone), strict=True):
            _alike(found, right)
        assert json.loads((together / "config.json").read_text())["batched"] == len(members)
        assert load_run(together).config == cell


def documents(folder: Path) -> list[dict[str, Any]]:
    """The result of a run and its records."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(text) for text in ((folder / "result.json").read_text(), *lines)]


def _alike(found: dict[str, Any], right: dict[str, Any]) -> None:
    assert found.keys() == right.keys()
    for name, value in right.items():
        if isinstance(value, dict):
            _alike(found[name], value)
        elif name != "seconds":
            assert found[name] == (pytest.approx(value, rel=1e-4, abs=2e-3) if isinstance(value, float) else value)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("normalize", [True, False])
def test_in_float64_twenty_steps_agree_to_rounding(tmp_path: Path, normalize: bool) -> None:
    members = cells("synthetic", epochs=1, batch_size=50, momentum=0.9, normalize=normalize)
    trained(tmp_path / "together", members)
    for cell in members:
        list(train(cell, tmp_path / "alone" / cell.name))
        one, other = weights(tmp_path / "together" / cell.name), weights(tmp_path / "alone" / cell.name)
        assert one.dtype == torch.float64 and (one - other).norm() <= 1e-10 * other.norm()


def test_label_noise_and_schedules_go_with_it(tmp_path: Path) -> None:
    recipe = {"epochs": 4, "batch_size": 128, "schedule": "cosine"}
    members = sweep.grid("digits", (8,), seeds=2, label_noises=(0.0, 0.5), recipe=recipe, device="cpu")
    trained(tmp_path / "together", members)
    for cell in members:
        list(train(cell, tmp_path / "alone" / cell.name))
        one, other = weights(tmp_path / "together" / cell.name), weights(tmp_path / "alone" / cell.name)
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_what_was_stopped_goes_on_to_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from samlite.training import session

    monkeypatch.setattr(session, "SAVE_EVERY", 0.0)
    members = cells(epochs=5)
    trained(tmp_path / "whole", members)
    for stop in (3, 8, 2):  # in the midst of an epoch's records, too
        stopped = train_batched(members, tmp_path / "parts")
        for _ in range(stop):
            next(stopped)
        stopped.close()
    trained(tmp_path / "parts", members)
    for cell in members:
        one, other = weights(tmp_path / "parts" / cell.name), weights(tmp_path / "whole" / cell.name)
        assert (one - other).norm() <= 1e-6 * other.norm()  # a batch of fewer members may round otherwise
        results = [json.loads((tmp_path / name / cell.name / "result.json").read_text()) for name in ("parts", "whole")]
        assert results[0]["epochs"] == results[1]["epochs"] == 5
    assert trained(tmp_path / "whole", members) == []


def test_one_that_diverges_takes_no_other_with_it(tmp_path: Path) -> None:
    members = cells()
    wild = replace(members[1], rho=1e18)
    events = trained(tmp_path, [*members, wild])
    failed = [(cell, result) for cell, result in events if isinstance(result, str)]
    assert failed == [] or [cell for cell, _ in failed] == [wild]
    alone = tmp_path / "without"
    trained(alone, members)
    for cell in members:
        one, other = weights(tmp_path / cell.name), weights(alone / cell.name)
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_a_loss_that_is_not_finite_ends_that_run_alone(tmp_path: Path) -> None:
    members = sweep.grid("synthetic", (8,), seeds=2, recipe={"epochs": 2, "lr": 0.02}, device="cpu")
    wild = [replace(cell, normalize=False, rho=1e4) for cell in members if cell.optimizer == "sam"]
    events = trained(tmp_path, [*members, *wild])
    failed = {cell for cell, result in events if isinstance(result, str)}
    assert failed <= set(wild)
    assert all((tmp_path / cell.name / "result.json").exists() for cell in members)


@pytest.mark.parametrize(
    ("task", "recipe", "line"),
    [
        ("digits", {"clip": 1.0}, "cannot be trained in a batch: clip must be 0, got 1.0"),
        ("digits", {"patience": 3}, "patience must be 0, got 3; leave --batched out"),
        ("digits", {"precision": "bfloat16"}, "precision must be float32, got bfloat16"),
    ],
)
def test_what_cannot_be_a_member_is_refused(tmp_path: Path, task: str, recipe: dict[str, Any], line: str) -> None:
    with pytest.raises(UsageError, match=line):
        trained(tmp_path, cells(task, **recipe))


def test_a_sweep_in_batches_is_measured_and_reported_as_any(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("samlite._C")
    monkeypatch.chdir(tmp_path)
    options = ("--widths", "8,16", "--seeds", 2, "--epochs", 2, "--device", "cpu", "--out", "both", "--json")
    ended = cli("sweep", "digits", *options, "--batched")
    assert ended.status == 0, ended.err
    report = json.loads(ended.out)
    assert len(report["rows"]) == 2 and not report["unfinished"] and not report["unmeasured"]
    assert json.loads(cli("sweep", "digits", *options, "--batched").out) == report


def test_cells_that_differ_by_more_are_not_put_together() -> None:
    members = cells(widths=(8, 16)) + cells(lr=0.01)
    groups = together(members, 2, True)
    assert sorted(cell.name for group in groups for cell in group) == sorted(cell.name for cell in members)
    assert all(len({(cell.width, cell.lr) for cell in group}) == 1 for group in groups)
    assert [len(group) for group in groups] == [3] * 6  # evened out over two jobs
    assert [len(group) for group in together(members, 1, True)] == [6] * 3


def test_only_small_networks_of_layers_that_can_are_put_together_by_themselves() -> None:
    assert pays(cells()[0]) and pays(cells("synthetic", (192,))[0])
    assert not pays(cells("synthetic", (1920,))[0])  # 100,000 parameters each
    assert not pays(cells(patience=1)[0])
    assert not pays(Config.of("cifar10", width=2))
    assert {len(group) for group in together(cells("synthetic", (1920,)), 1, None)} == {1}
    assert {len(group) for group in together(cells(), 1, None)} == {6}


@pytest.mark.parametrize(
    ("optimizers", "recipe", "sizes"),
    [
        (["sgd", "sam", "friendly", "agnostic", "sampa"], {}, [4] + 6 * [1]),
        (["sgd", "sam"], {"adaptive": "all"}, [2, 1, 1]),
        (["sgd", "sam"], {"every": 2}, [2, 1, 1]),
        (["adam", "sam"], {}, 4 * [1]),
    ],
)
def test_runs_whose_options_are_for_sam_alone_are_left_alone(
    optimizers: list[str], recipe: dict[str, Any], sizes: list[int]
) -> None:
    members = sweep.grid("digits", (8,), optimizers, seeds=2, recipe=recipe, device="cpu")
    assert [len(group) for group in together(members, 1, None)] == sizes


def test_what_a_batch_needs_of_a_network_is_said() -> None:
    with pytest.raises(UsageError, match="augment must be False, got True; leave --batched out"):
        together([Config.of("cifar10", width=2)], 1, True)
    assert "Conv2d" in _obstacle(nn.Sequential(nn.Conv2d(1, 1, 1)))
    assert "Dropout" in _obstacle(nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.1)))
    assert "Sequential" in _obstacle(nn.Linear(1, 1))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
def test_a_batched_sweep_that_is_killed_and_repeated_ends_with_the_same_files(tmp_path: Path) -> None:
    """Each member has the same epochs and records but for rounding, whenever the kill came."""
    options = "--widths 64 --seeds 2 --rhos 0.05,0.2 --epochs 60 --device cpu --measure none --batched --jobs 1"
    call = [sys.executable, "-m", "samlite.cli", "sweep", "synthetic", *options.split(), "--out"]
    assert subprocess.run([*call, tmp_path / "whole"], capture_output=True).returncode == 0
    with subprocess.Popen([*call, tmp_path / "parts"], stdout=-3, stderr=-3, start_new_session=True) as killed:
        while not list(tmp_path.glob("parts/*/checkpoint.pt")) and killed.poll() is None:
            time.sleep(0.05)
        os.killpg(killed.pid, signal.SIGKILL)
    assert not list(tmp_path.glob("parts/*/result.json"))
    assert subprocess.run([*call, tmp_path / "parts"], capture_output=True).returncode == 0
    names = {path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file()}
    assert names == {path.relative_to(tmp_path / "parts") for path in (tmp_path / "parts").rglob("*") if path.is_file()}
    for cell in sweep.read(tmp_path / "whole"):
        one, other = weights(tmp_path / "parts" / cell.name), weights(tmp_path / "whole" / cell.name)
        assert (one - other).norm() <= 1e-3 * other.norm(), cell.name  # rounding, which grows over 1,920 steps
        assert len(documents(tmp_path / "parts" / cell.name)) == 61


def test_a_batch_of_the_cluster_and_one_of_what_cannot_be_are_refused(cli: Any, tmp_path: Path) -> None:
    for options, line in (
        (("digits", "--engine", "slurm"), "--batched must go with --engine local; leave it out"),
        (("digits", "--optimizers", "adam,sam"), "base must be sgd, got adam; leave --batched out"),
    ):
        ended = cli("sweep", *options, "--widths", "8", "--device", "cpu", "--batched", "--out", tmp_path / "x")
        assert ended.status == 2 and line in ended.err
