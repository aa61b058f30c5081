"""A build backend around scikit-build-core: the compiled module is built for the torch of the environment it goes into.

pip builds in an environment of its own, which still has the `sys.prefix` of the one that is installed into. Where that
one has torch, CMake compiles against it, and no second torch is downloaded. Only where there is none is torch a
requirement of the build. The wheel then requires the minor version of torch that it was built for.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from find_torch import find_torch, minor_of
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


def dynamic_metadata(field: str, settings: Mapping[str, Any] | None = None) -> Sequence[str]:
    """The dependencies of a wheel: those of `settings`, and the minor version of torch that it is built for."""
    torch = find_torch()
    if torch is None:
        pin = TORCH
    else:
        major, minor = minor_of(torch.version)
        pin = f"torch>={major}.{minor},<{major}.{minor + 1}"
    return [pin, *(settings or {}).get("others", [])]
