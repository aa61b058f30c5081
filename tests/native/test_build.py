"""Building at import. Real builds take most of a minute each, and are slow tests."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

CODE = """
import torch
torch.__version__ = "2.99.0"  # for which no package has a module
from samlite.curvature.compiled import compiled
try:
    print(compiled().__file__)
except ImportError as error:
    print("one line:", error)
"""


def start(cache: Path, **variables: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "SAMLITE_CACHE": str(cache), **variables}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", CODE], env=environment, stdout=pipe, stderr=pipe, text=True)


def test_without_a_compiler_one_line_says_the_two_ways_out(tmp_path: Path) -> None:
    out, err = start(tmp_path / "cache", CXX="no-such-compiler").communicate(timeout=120)
    assert out.startswith("one line: samlite has no compiled module for torch 2.99.0, and no C++ compiler to build one")
    assert "install one" in out and "samlite.versions" in out and out.count("\n") == 1 and not err
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    out, _ = start(tmp_path / "file" / "cache").communicate(timeout=120)
    assert out.startswith("one line: samlite cannot build its compiled module in") and "set SAMLITE_CACHE" in out
    assert out.count("\n") == 1 and (tmp_path / "file").read_text() == "mine"


def test_a_compiler_that_fails_is_told_in_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    out, err = start(tmp_path / "cache", CXX=str(shutil.which("false"))).communicate(timeout=120)
    assert out.startswith("one line: samlite cannot compile its module for torch 2.99.0: exit status 1")
    assert err.count("\n") == 1 and "this takes about a minute" in err
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == [".lock"]


@pytest.mark.slow
def test_two_processes_at_once_build_once_and_the_next_builds_nothing(tmp_path: Path) -> None:
    if not shutil.which("c++"):
        pytest.skip("needs a C++ compiler")
    both = [start(tmp_path) for _ in range(2)]
    ended = [process.communicate(timeout=600) for process in both]
    assert len({out for out, _ in ended}) == 1 and ended[0][0].strip().endswith(".so")
    assert sorted(err.count("compiling its module") for _, err in ended) == [0, 1]
    out, err = start(tmp_path).communicate(timeout=120)
    assert out == ended[0][0] and not err


@pytest.mark.slow
def test_a_build_that_is_killed_leaves_nothing_that_a_later_one_trips_over(tmp_path: Path) -> None:
    if not shutil.which("c++"):
        pytest.skip("needs a C++ compiler")
    killed = start(tmp_path)
    while not list(tmp_path.glob("*/build-*/*.o")):  # in the middle of it
        time.sleep(0.1)
        assert killed.poll() is None
    killed.kill()
    killed.communicate()
    out, _ = start(tmp_path).communicate(timeout=600)
    built = Path(out.strip())
    assert built.is_file() and [path.name for path in built.parent.iterdir() if path.name != ".lock"] == [built.name]
