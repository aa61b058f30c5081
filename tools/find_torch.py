"""Finds the torch that the compiled module is built for, without importing it."""

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


if __name__ == "__main__":  # for CMake: its folder and its version
    found = find_torch()
    if found is None:
        sys.exit("samlite must be built beside torch, which is not installed; pip install torch")
    print(Path(str(found.locate_file("torch"))).as_posix(), found.version, sep=";", end="")
