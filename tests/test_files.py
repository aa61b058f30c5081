import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
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


def test_a_write_that_dies_midway_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "file.json", {"old": 1})
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "file.json") as beside:
        beside.write_text("half")
        raise KeyboardInterrupt
    assert read_json(tmp_path / "file.json") == {"old": 1}
    write_json(tmp_path / "file.json", {"new": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"a": 1', "\0", "9" * 5000, "[" * 100000])
def test_a_file_that_is_no_json_object_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(ValueError, match="file.json must"):
        read_json(tmp_path / "file.json")


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
