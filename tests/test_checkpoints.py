import os
import pickle
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from samlite import checkpoints
from samlite.checkpoints import (
    load_checkpoint,
    load_model_weights,
    load_weights,
    locked,
    read_json,
    replacing,
    save_checkpoint,
    save_model_weights,
    write_json,
)

STATE = {"weights": torch.arange(5, dtype=torch.float64), "epoch": 3, "records": [{"loss": 0.1}], "none": None}


def test_a_checkpoint_comes_back_as_it_was_saved_with_the_same_bytes_each_time(tmp_path: Path) -> None:
    for name in ("one.pt", "two.pt"):
        save_checkpoint(tmp_path / name, STATE)
    state = load_checkpoint(tmp_path / "one.pt")
    assert torch.equal(state.pop("weights"), STATE["weights"])
    assert state == {key: value for key, value in STATE.items() if key != "weights"}
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "two.pt").read_bytes()


def test_a_write_that_dies_midway_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "file.json", {"old": 1})
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "file.json") as beside:
        beside.write_text("half")
        raise KeyboardInterrupt
    assert read_json(tmp_path / "file.json") == {"old": 1}
    write_json(tmp_path / "file.json", {"new": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


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
    for load in (load_checkpoint, load_weights):
        with pytest.raises(ValueError, match="truncated, damaged, or holds code"):
            load(path)
    assert not trace.exists()


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"a": 1', "\0", "9" * 5000, "[" * 100000])
def test_a_file_that_is_no_json_object_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(ValueError, match="file.json must"):
        read_json(tmp_path / "file.json")


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


def test_weights_are_found_in_every_usual_form_of_file(tmp_path: Path) -> None:
    weights = {"weight": torch.ones(2, 2)}
    torch.save(weights, tmp_path / "plain.pt")
    torch.save({"model": weights, "epoch": 1}, tmp_path / "nested.pth")
    torch.save({"state_dict": weights}, tmp_path / "lightning.pt")
    save_file(weights, tmp_path / "safe.safetensors")
    for path in tmp_path.iterdir():
        assert torch.equal(load_weights(path)["weight"], weights["weight"])
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"epoch": 1}, tmp_path / "numbers.pt")
    for name in ("list.pt", "numbers.pt"):
        with pytest.raises(ValueError, match=f"{name} must hold"):
            load_weights(tmp_path / name)


def test_one_process_at_a_time_holds_a_folder_and_a_killed_one_lets_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "PATIENCE", 0.2)
    hold = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
    hold += "print(flush=True); time.sleep(60)"
    with locked(tmp_path):
        pass
    holder = subprocess.Popen([sys.executable, "-c", hold, tmp_path / ".lock"], stdout=subprocess.PIPE)
    with holder:
        holder.stdout.readline()
        with pytest.raises(BlockingIOError, match="is in use by another process"), locked(tmp_path):
            pass
        holder.send_signal(signal.SIGKILL)
    with locked(tmp_path):
        pass
