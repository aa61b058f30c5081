"""Finds the torch that the compiled module is built for, without importing it."""

import re
import runpy
import sys
import sysconfig
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path


def find_torch() -> Distribution | None:
    """The torch to build for: of this environment, else of the one that is installed into. It is not imported."""
    return next(iter(distributions(name="torch", path=[*sys.path, *_target()])), None)


def _target() -> Iterator[str]:
    """The site-packages of the environment that is installed into, and of its base where it sees that."""
    paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    settings = Path(sys.prefix, "pyvenv.cfg")
    if settings.is_file() and "include-system-site-packages = true" in settings.read_text().lower():
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        paths += [sysconfig.get_path("purelib", vars=base), sysconfig.get_path("platlib", vars=base)]
    yield from dict.fromkeys(paths)


def minor_of(version: str) -> tuple[int, int]:
    """(2, 13) of 2.13.0+cpu."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _cxx11_abi(folder: Path) -> str:
    """Whether torch was compiled with the newer strings of libstdc++, as all its wheels since 2.7 are: 1 or 0."""
    settings = folder / "share" / "cmake" / "Torch" / "TorchConfig.cmake"
    told = re.search(r"_GLIBCXX_USE_CXX11_ABI=(\d)", settings.read_text()) if settings.is_file() else None
    return told[1] if told else "1"


if __name__ == "__main__":  # for CMake: its folder, its version, the name of the module, and the ABI of its strings
    torch = find_torch()
    if torch is None:
        sys.exit("samlite must be built beside torch, which is not installed; pip install torch")
    place = Path(str(torch.locate_file("torch")))
    naming = runpy.run_path(str(Path(__file__).resolve().parents[1] / "samlite" / "native" / "naming.py"))
    module = naming["module_name"](torch.version)
    print(place.as_posix(), torch.version, module, _cxx11_abi(place), sep=";", end="")
