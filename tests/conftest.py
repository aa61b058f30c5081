"""What several test files share."""

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before torch starts: the suite itself is what runs in parallel.
os.environ["OMP_NUM_THREADS"] = "1"
# Before rich is imported, which would take the width of every table from it.
os.environ.pop("COLUMNS", None)
# Before `datasets` is imported: no network, and no traces in the user's cache.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="samlite-tests-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

import pytest  # noqa: E402
import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402


class Waits(TorchDispatchMode):
    """Counts the operations inside that wait for the device: reads of a number, and eigenproblems on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.__name__.split(".")[0] in ("_local_scalar_dense", "linalg_eigh", "_linalg_eigh")
        return func(*args, **(kwargs or {}))


@dataclass
class Result:
    """How a command line ended."""

    status: int
    out: str
    err: str


@pytest.fixture
def sweep(tmp_path: Path) -> Any:
    """A sweep with results made up; empty at first."""
    from sweeps import Sweep  # which is slow, and few tests need it

    return Sweep(tmp_path)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run the command line in this process, which is fast; `process` is the real thing."""
    from samlite.cli import main

    def run(*arguments: str) -> Result:
        with pytest.raises(SystemExit) as end:
            main(list(map(str, arguments)))
        captured = capsys.readouterr()
        return Result(end.value.code or 0, captured.out, captured.err)

    return run


def command(*arguments: object) -> list[str]:
    """The command line as a process of its own."""
    return [sys.executable, "-m", "samlite.cli", *map(str, arguments)]


def process(*arguments: object, cwd: Path | None = None) -> Result:
    """Run the command line in a process of its own."""
    done = subprocess.run(command(*arguments), cwd=cwd, capture_output=True, text=True, timeout=300)
    return Result(done.returncode, done.stdout, done.stderr)


def contents(folder: Path) -> dict[str, Any]:
    """Everything in a folder but the times, so that equal contents compare equal."""
    return {
        str(path.relative_to(folder)): _content(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock" and ".claims" not in path.parts
    }


def _content(path: Path) -> Any:
    if path.suffix == ".json":
        return _without_seconds(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return [_without_seconds(json.loads(line)) for line in path.read_text().splitlines()]
    if path.suffix == ".pt":
        import torch

        return _without_seconds(torch.load(path, weights_only=True))
    return path.read_bytes()


def _without_seconds(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_seconds(each) for key, each in value.items() if key != "seconds"}
    if isinstance(value, list):
        return [_without_seconds(each) for each in value]
    if hasattr(value, "numpy"):
        return value.dtype, value.shape, value.numpy().tobytes()
    return value


@pytest.fixture
def float64() -> Iterator[None]:
    """Tensors are float64 by default, and random ones the same in every test."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def real_data() -> Path:
    """The folder of real data sets that SAMLITE_DATA names."""
    if "SAMLITE_DATA" not in os.environ:
        pytest.skip("SAMLITE_DATA is not set")
    return Path(os.environ["SAMLITE_DATA"])
