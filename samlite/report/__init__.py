"""What a sweep says: numbers with their intervals, tables, figures and verdicts."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from samlite.report.outcomes import Report, summarize

__all__ = ["Report", "summarize"]


def __getattr__(name: str) -> Any:
    """Import on first use: a table needs no torch."""
    if name in __all__:
        return getattr(import_module("samlite.report.outcomes"), name)
    raise AttributeError(f"module 'samlite.report' has no attribute {name!r}")
