import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from samlite.training.checkpoints import (
    load_checkpoint,
    load_model_weights,
    load_weights,
    save_checkpoint,
    save_model_weights,
)
from samlite.training.weights import load_weight_sets

STATE = {"weights": torch.arange(5, dtype=torch.float64), "epoch": 3, "records": [{"loss": 0.1}], "none": None}


def test_a_checkpoint_comes_back_as_it_was_saved_with_the_same_bytes_each_time(tmp_path: Path) -> None:
    for name in ("one.pt", "two.pt"):
        save_checkpoint(tmp_path / name, STATE)
    state = load_checkpoint(tmp_path / "one.pt")
    assert torch.equal(state.pop("weights"), STATE["weights"])
    assert state == {key: value for key, value in STATE.items() if key != "weights"}
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "two.pt").read_bytes()


def test_a_checkpoint_cut_short_anywhere_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, STATE)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), len(whole) // 40), *range(len(whole) - 120, len(whole), 10)]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="truncated, damaged, or holds code") as error:
            load_checkpoint(path)
        assert "\n" not in str(error.value) and str(path) in str(error.value)


class Hostile:
    """Unpickled, it creates the file it names."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["torch", "pickle", "zip"])
def test_a_hostile_pickle_is_refused_and_not_executed(tmp_path: Path, form: str) -> None:
    path, trace = tmp_path / "checkpoint.pt", tmp_path / "executed"
    if form == "torch":
        torch.save({"model": Hostile(trace)}, path)
    elif form == "pickle":
        path.write_bytes(pickle.dumps(Hostile(trace)))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Hostile(trace)))
            archive.writestr("archive/version", "3\n")
    with pytest.raises(ValueError, match="truncated, damaged, or holds code"):
        load_checkpoint(path)
    with pytest.raises(ValueError, match="cannot be read|must hold named tensors"):
        load_weight_sets(path)
    assert not trace.exists()


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
    model[1].weight = model[0].weight
    return model


def test_tied_weights_are_written_once_and_stay_tied(tmp_path: Path) -> None:
    model, other = tied(), tied()
    save_model_weights(tmp_path / "model.safetensors", model)
    assert "1.weight" not in load_weights(tmp_path / "model.safetensors")
    load_model_weights(tmp_path / "model.safetensors", other)
    assert other[1].weight is other[0].weight
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_weights_that_do_not_fit_or_are_cut_short_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_model_weights(path, nn.Linear(2, 2))
    with pytest.raises(ValueError, match="does not hold the weights of this run's network"):
        load_model_weights(path, nn.Linear(3, 3))
    path.write_bytes(path.read_bytes()[:20])
    for load in (lambda: load_model_weights(path, nn.Linear(2, 2)), lambda: load_weights(path)):
        with pytest.raises(ValueError, match="model.safetensors"):
            load()


def test_weights_of_another_kind_are_refused_and_of_another_precision_taken(tmp_path: Path) -> None:
    path, model = tmp_path / "model.safetensors", nn.Linear(2, 2)
    weights = {name: torch.ones_like(tensor) for name, tensor in model.state_dict().items()}
    for dtype, words in ((torch.complex64, "complex64"), (torch.int8, "int8"), (torch.bool, "bool")):
        save_file({name: tensor.to(dtype) for name, tensor in weights.items()}, path)
        with pytest.raises(ValueError, match=f"must hold weight as floating-point numbers, got torch.{words}"):
            load_model_weights(path, model)
    save_file({name: tensor.double() for name, tensor in weights.items()}, path)
    load_model_weights(path, model)
    assert torch.equal(model.weight, torch.ones(2, 2))
