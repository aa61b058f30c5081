"""A build backend around scikit-build-core: the compiled module is built for the torch of the environment it goes into.

pip builds in an environment of its own, which still has the `sys.prefix` of the one that is installed into. Where that
one has torch, CMake compiles against it, and no second torch is downloaded. Only where there is none is torch a
requirement of the build. The wheel then requires the minor version of torch that it was built for.
"""

import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

from scikit_build_core import build as core
from scikit_build_core.build import (  # noqa: F401  (hooks that need no torch)
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
)

TORCH = "torch>=2.13,<2.14"  # the one that is tested, where there is none


def get_requires_for_build_wheel(config_settings: Mapping[str, Any] | None = None) -> list[str]:
    """What pip installs before it builds a wheel."""
    return core.get_requires_for_build_wheel(config_settings) + _torch_unless_there()


def get_requires_for_build_editable(config_settings: Mapping[str, Any] | None = None) -> list[str]:
    """What pip installs before it builds an editable wheel."""
    return core.get_requires_for_build_editable(config_settings) + _torch_unless_there()


def _torch_unless_there() -> list[str]:
    return [] if find_torch() else [TORCH]


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


def dynamic_metadata(field: str, settings: Mapping[str, Any] | None = None) -> Sequence[str]:
    """The dependencies of a wheel: those of `settings`, and the minor version of torch that it is built for."""
    torch = find_torch()
    major, minor = torch.version.split(".")[:2] if torch else ("", "")
    pin = f"torch>={major}.{minor},<{major}.{int(minor) + 1}" if torch else TORCH
    return [pin, *(settings or {}).get("others", [])]


if __name__ == "__main__":  # for CMake: the folder and the version of that torch
    found = find_torch()
    if found is None:
        sys.exit("samlite must be built beside torch, which is not installed; pip install torch")
    print(Path(str(found.locate_file("torch"))).as_posix(), found.version, sep=";", end="")
