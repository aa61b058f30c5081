"""Tasks of the user's own: a network by width, splits and a loss, trained and swept like the others."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Result
from torch import nn

from samlite import UsageError, tasks, training
from samlite.tasks.own import name_of, task
from samlite.training.config import Config

NETS = """
import torch
from torch import nn

def draw(n, seed, targets):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=g)
    return x, targets(x)

labels = lambda x: (x @ torch.tensor([1.0, -1.0, 0.5, 0.0])).sign().long() + 1
numbers = lambda x: x[:, :2].sin()

def mlp(width):
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))

def regressor(width):
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2)).double()

def splits():
    return draw(60, 0, labels), draw(40, 1, labels)

def three():
    return {"train": draw(60, 0, numbers), "validation": draw(20, 2, numbers), "test": draw(40, 1, numbers)}

class Set(torch.utils.data.Dataset):
    def __init__(self, seed):
        self.pair = draw(50, seed, labels)
    def __len__(self):
        return 50
    def __getitem__(self, i):
        return self.pair[0][i], int(self.pair[1][i])

def sets(seed):
    return Set(seed), Set(seed + 1)

def wrong():
    return 3

def lopsided():
    return draw(60, 0, labels), (torch.ones(3, 4), torch.ones(2))

def distance(outputs, targets):
    return (outputs - targets).abs().mean()

number = 3
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_nets", raising=False)
    (tmp_path / "own_nets.py").write_text(NETS)
    task.cache_clear()
    return tmp_path


@pytest.mark.parametrize(
    ("model", "data", "loss", "metric", "classes"),
    [
        ("mlp", "splits", "cross_entropy", "accuracy", 3),
        ("mlp", "sets", "cross_entropy", "accuracy", 3),
        ("regressor", "three", "mse", "loss", None),
        ("regressor", "three", "own_nets:distance", "loss", None),
    ],
)
def test_a_network_and_data_of_ones_own_are_trained_and_resume(
    place: Path, model: str, data: str, loss: str, metric: str, classes: int | None
) -> None:
    name = name_of(f"own_nets:{model}", f"own_nets:{data}", loss)
    known = tasks.get(name)
    split = known.splits(None, 0)
    assert known.metric == metric and known.classes_in(split) == classes
    assert split.train.inputs.dtype == torch.float32 and len(split.train) in (54, 45, 60)
    config = Config.of(name, width=8, optimizer="sam", epochs=4, threads=1, device="cpu")
    records = list(training.train(config, place / "whole"))
    assert len(records) == 4 and records[-1].train_loss < records[0].train_loss
    run = training.train(config, place / "part")
    next(run), next(run)
    run.close()
    for _ in training.train(config, place / "part"):
        pass
    whole, part = ((place / name / "model.safetensors").read_bytes() for name in ("whole", "part"))
    assert whole == part


def test_noise_moves_labels_among_the_classes_that_the_data_have(place: Path) -> None:
    name = name_of("own_nets:mlp", "own_nets:splits", "cross_entropy")
    for _ in training.train(Config.of(name, width=4, epochs=1, label_noise=0.5, device="cpu"), place / "noisy"):
        pass
    with pytest.raises(UsageError, match="label_noise must be 0"):
        Config.of(name_of("own_nets:regressor", "own_nets:three", "mse"), label_noise=0.5)


def test_it_is_swept_reported_and_measured_from_the_terminal(place: Path, cli: Callable[..., Result]) -> None:
    own = ["--model", "own_nets:mlp", "--data", "own_nets:splits"]
    sweep = cli("sweep", *own, "--widths", "4", "--seeds", "1", "--epochs", "2", "--json")
    assert sweep.status == 0, sweep.err
    report = json.loads(sweep.out)
    assert report["task"] == "own_nets:mlp on own_nets:splits by cross_entropy" and report["metric"] == "accuracy"
    folder = "runs/own_nets-mlp-on-own_nets-splits-by-cross_entropy"
    assert cli("report", folder).status == 0
    assert cli("sharpness", f"{folder}/sgd-w4-s0", "--top", "1").status == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train digits --model own_nets:mlp --data own_nets:splits", "TASK must not be given with --model, got digits"),
        ("train --model own_nets:mlp", "--model needs --data pkg.mod:splits"),
        ("train --loss mse", "--loss must go with --model, got mse"),
        ("train --model own_nets:none --data own_nets:splits", "model must name something in own_nets, got 'none'"),
        ("train --model mlp --data own_nets:splits", "must name objects as pkg.mod:name, got 'mlp'"),
        ("train --model own_nets:number --data own_nets:splits", "model must name a function, got 'own_nets:number'"),
        ("train --model own_nets:splits --data own_nets:splits", "model: own_nets:splits failed with TypeError"),
        ("train --model own_nets:mlp --data own_nets:wrong", "returns (train, test) or (train, validation, test)"),
        ("train --model own_nets:mlp --data own_nets:lopsided", "the test split must be a pair of tensors"),
        ("train --model own_nets:mlp --data own_nets:three", "of class numbers for loss cross_entropy"),
        ("sweep --model own_nets:mlp --widths 4", "--model needs --data"),
    ],
)
def test_what_cannot_be_gets_one_line(place: Path, cli: Callable[..., Result], arguments: str, message: str) -> None:
    found = cli(*arguments.split())
    assert found.status == 2 and len(found.err.strip().splitlines()) == 1, found.err
    assert message in found.err


def test_a_factory_must_return_a_module(place: Path) -> None:
    known: Any = tasks.get(name_of("own_nets:labels", "own_nets:splits", "cross_entropy"))
    with pytest.raises(UsageError, match="model: own_nets:labels failed"):
        known.build(4, None, {})
    assert isinstance(tasks.get(name_of("own_nets:mlp", "own_nets:splits", "mse")).loss, nn.MSELoss)
