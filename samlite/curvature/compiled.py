"""The compiled module, and how its errors reach a user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING

import torch

from samlite.errors import UsageError

if TYPE_CHECKING:
    from types import ModuleType


def compiled() -> ModuleType:
    """`samlite._C`, loaded on first use and only beside the torch it was built for."""
    rebuild = "pip install --no-build-isolation --no-deps --force-reinstall ."
    running = torch.__version__.split("+")[0]
    try:
        built_for = import_module("samlite._torch_version").__version__.split("+")[0]
        if built_for == running:
            return import_module("samlite._C")
        reason = f"was built for torch {built_for}, but torch is {running}"
    except ImportError as error:
        reason = f"could not be loaded ({error})"
    raise ImportError(f"samlite._C {reason}; build it for this torch in a source folder of samlite: {rebuild}")


@contextmanager
def usage_errors() -> Iterator[None]:
    """Raise what the compiled module refuses as a mistake of its user."""
    try:
        yield
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error
