import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from samlite import files
from samlite.files import claimed, locked, read_json, replacing, write_json
from samlite.report.canvas import new_figure
from samlite.training.checkpoints import (
    load_checkpoint,
    load_model_weights,
    load_weights,
    save_checkpoint,
    save_model_weights,
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
    monkeypatch.setattr(files, "PATIENCE", 0.2)
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


def test_a_disk_that_is_full_leaves_the_old_file_alone_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"old": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            write_json(path, {"new": "x" * 1000})
        with pytest.raises(OSError):
            save_checkpoint(path, STATE)
        with pytest.raises(OSError), new_figure(tmp_path / "figure.png", (1, 1)):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert error.value.filename == str(path)
    assert read_json(path) == {"old": 1} and [each.name for each in tmp_path.iterdir()] == ["file.json"]


def test_of_many_that_write_one_file_at_once_each_writes_a_whole_one(tmp_path: Path) -> None:
    texts = [letter * 300_000 for letter in "abcdefgh"]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: files.write_text(tmp_path / "file", text), texts * 2))
    assert (tmp_path / "file").read_text() in texts
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("kind", ["pipe", "link", "half"])
def test_what_a_killed_process_left_beside_a_file_does_not_matter(tmp_path: Path, kind: str) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    beside = tmp_path / ".file.json.new"
    {
        "pipe": lambda: os.mkfifo(beside),
        "link": lambda: beside.symlink_to("thesis.tex"),
        "half": lambda: beside.write_text("{" * 500),
    }[kind]()
    write_json(tmp_path / "file.json", {"new": 2})
    assert read_json(tmp_path / "file.json") == {"new": 2} and not beside.exists()
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop"])
def test_what_is_no_file_is_neither_read_nor_replaced(tmp_path: Path, kind: str) -> None:
    path, lock = tmp_path / "file.safetensors", tmp_path / "run" / ".lock"
    lock.parent.mkdir()
    for each in (path, lock):
        {
            "pipe": lambda place: os.mkfifo(place),
            "device": lambda place: place.symlink_to("/dev/zero"),
            "folder": lambda place: place.mkdir(),
            "loop": lambda place: place.symlink_to(place),
        }[kind](each)
    before = [each.lstat().st_ino for each in (path, lock)]
    error = ValueError if kind in ("pipe", "device") else OSError
    calls: list[Callable[[], Any]] = [
        lambda: read_json(path),
        lambda: load_checkpoint(path),
        lambda: load_weights(path),
        lambda: load_model_weights(path, nn.Linear(2, 2)),
        lambda: write_json(path, {}),
        lambda: save_checkpoint(path, {}),
        lambda: save_model_weights(path, nn.Linear(2, 2)),
        lambda: claimed(path),
    ]
    for call in calls:
        with pytest.raises(error) as refusal:
            call()
        assert str(path) in str(refusal.value)
    with pytest.raises(error), locked(lock.parent):
        pass
    assert [each.lstat().st_ino for each in (path, lock)] == before


def test_claiming_a_file_keeps_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / ".lock").symlink_to("thesis.tex")
    with pytest.raises(OSError, match="symbolic links"), locked(tmp_path):
        pass
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": Infinity}', "a number must be finite, got Infinity"),
        ('{"a": [NaN]}', "a number must be finite, got NaN"),
        ('{"a": 1e999}', "a number must be finite, got 1e999"),
        ('{"a": 1, "a": 2}', "the field 'a' is there twice"),
    ],
)
def test_json_is_read_as_the_standard_has_it(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_json(tmp_path / "file.json")
    (tmp_path / "file.json").write_bytes(b'\xef\xbb\xbf{"a": 1e3}')  # the mark that some editors put first
    assert read_json(tmp_path / "file.json") == {"a": 1000.0}


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


def test_weights_must_have_names(tmp_path: Path) -> None:
    for state, found in (
        ({0: torch.ones(2)}, "0: tensor"),
        ({"a": torch.ones(2), ("b",): torch.ones(2)}, r"\('b',\): tensor"),
        ({"a": torch.ones(2), "b": 3}, "'b': 3"),
    ):
        torch.save(state, tmp_path / "net.pt")
        with pytest.raises(ValueError, match=f"must hold named tensors, .* got {found}"):
            load_weights(tmp_path / "net.pt")
