"""The compiled module, and how its errors reach a user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING

from samlite.errors import UsageError

if TYPE_CHECKING:
    from types import ModuleType


def compiled() -> ModuleType:
    """`samlite._C`, loaded on first use, and built first where none fits the torch of this process."""
    try:
        return import_module("samlite._C")
    except ModuleNotFoundError as error:
        raise ImportError(f"samlite._C could not be loaded ({error}); pip install samlite again") from error


@contextmanager
def usage_errors() -> Iterator[None]:
    """Raise what the compiled module refuses as a mistake of its user."""
    try:
        yield
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error
