"""``python -m samlite.versions``: the versions that matter, and which compiled module is there for which torch."""

import platform
import sys
from collections.abc import Iterator

import torch

from samlite import __version__
from samlite.native import build, modules


def lines() -> Iterator[tuple[str, str]]:
    """What is installed, by its name."""
    yield "samlite", __version__
    yield "python", platform.python_version()
    yield "torch", torch.__version__
    yield "packaged for torch", ", ".join(modules.all_packaged()) or "none"
    cached = build.cached()
    yield "built for this torch", str(cached) if cached else "no"
    yield "compiler", build.find_compiler() or "none"
    if modules.packaged(torch.__version__):
        yield "in use", "the packaged module"
    elif cached:
        yield "in use", "the module that was built"
    else:
        yield "in use", "none yet: it is built on first use" if build.find_compiler() else "none"


def main() -> int:
    for name, value in lines():
        print(f"{name:<22}{value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
