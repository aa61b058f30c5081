import subprocess
import sys
from pathlib import Path

import pytest
import torch

from samlite.native.modules import all_packaged, packaged
from samlite.native.naming import module_name


@pytest.mark.parametrize(
    ("version", "name"),
    [
        ("2.13.0", "torch_2_13"),
        ("2.13.1+cu130", "torch_2_13"),
        ("2.6.0+cpu", "torch_2_6"),
        ("2.9.1.post2", "torch_2_9"),
        ("2.14.0a0+git1a2b3c", "torch_2_14_0a0_git1a2b3c"),  # whose interface may still change
        ("2.15.0.dev20261101", "torch_2_15_0_dev20261101"),
    ],
)
def test_a_module_is_named_after_the_minor_version_of_a_release(version: str, name: str) -> None:
    assert module_name(version) == name


def test_the_module_in_use_is_the_one_for_this_torch() -> None:
    module = pytest.importorskip("samlite._C")
    assert module.__name__ == "samlite._C"
    assert Path(module.__file__).name.startswith(module_name(torch.__version__)) or "cache" in module.__file__
    assert packaged("1.0.0") is None


def test_versions_say_what_is_there_for_which_torch() -> None:
    done = subprocess.run([sys.executable, "-m", "samlite.versions"], capture_output=True, text=True, check=True)
    said = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if len(line.split()) == 2)
    assert said["torch"] == torch.__version__ and said["samlite"]
    assert "packaged for torch" in done.stdout and "in use" in done.stdout
    assert all(minor in done.stdout for minor in all_packaged())
